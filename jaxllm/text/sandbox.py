"""Where chat templates run: Jinja's sandbox, with a limit to the time and the memory that a template takes.

A template came with a checkpoint, and a short one can ask for anything: `{{ 'a' * 2000000000 }}`, loops in loops, a list
of itself doubled forty times. So each value that a template makes (by an operator, a call, a filter, a literal, a block) is
weighed when it is made, what would grow out of proportion is refused before it is made, and every loop looks at the clock.
"""
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.visitor import NodeTransformer

from jaxllm.errors import CapacityError

SECONDS = 5.0           # of one rendering; published templates take milliseconds
LARGEST = 16 << 20      # weight of one value beyond 16 times the conversation's: characters, and ELEMENT for each part
ELEMENT = 16            # so that a million empty lists is the most: going through them takes half a second
IN_ALL = 512 << 20      # bytes of all values that one rendering makes, dropped ones included: a text grown in pieces counts often
BITS = 1 << 16          # of an integer: the time of arithmetic grows faster than its size
UNBOUNDED = ("striptags", "urlize", "wordwrap", "wordcount", "pprint")  # filters that take more than they give; no chat template needs them
CODECS = ("utf-8", "utf8", "ascii", "latin-1")  # of linear time; punycode's is quadratic


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what a model wrote, for training; here it only shows its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore: Python looks some of those up on its own."""

    def __init__(*args, **kwargs):
        self, *args = args
        jinja2.utils.Namespace.__init__(self, {_plain_name(k): v for k, v in dict(*args, **kwargs).items()})

    def __setitem__(self, name, value):
        super().__setitem__(_plain_name(name), value)


def _plain_name(name: str) -> str:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")
    return name


class Room(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; `run` renders one of its templates within the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,  # the optimizer would compute constants unwatched
                         extensions=[Generation, jinja2.ext.loopcontrols])
        self.globals["namespace"] = Namespace
        self.globals["lipsum"] = self.filters["random"] = _at_random
        self.filters["tojson"] = _tojson  # Jinja's own escapes HTML
        self.filters = {name: self._watched(name, f) for name, f in self.filters.items() if name not in UNBOUNDED}
        self._one_at_a_time = threading.Lock()
        self._until, self._most, self._left = 0.0, 0, 0

    def run(self, template: jinja2.Template, variables: dict) -> str:
        """The text of the template. Raises CapacityError where it takes more than the limits."""
        with self._one_at_a_time:
            self._until, self._left = time.monotonic() + SECONDS, IN_ALL
            self._most = sys.maxsize
            self._most = 16 * self._weigh(list(variables.values())) + LARGEST
            return template.render(variables)

    # -- what is watched -------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called at each turn of a loop and each run of a macro."""
        if time.monotonic() > self._until:
            raise CapacityError(f"the chat template takes more than {SECONDS:g} seconds; pass another with chat_template=")

    def made(self, value, out_of=None):
        """The value that a template has made, once it is known to be within the limits.

        Parts of a text are new values; those of anything else were there before.
        """
        self.tick()
        if not isinstance(value, Iterator):  # what an iterator yields is weighed by whoever collects it
            weight = self._weigh(value)
            self._left -= 4 * weight if isinstance(out_of, (str, bytes)) else sys.getsizeof(value)
            if self._left < 0:
                self._refuse()
        return value

    def joined(self, *values) -> str:
        """The texts of the values, one after the other: Jinja's `~`."""
        return self.made("".join(map(str, values)))

    def concat(self, pieces) -> str:
        """The text of a template, a macro or a block from its pieces."""
        kept, size = [], 0
        for piece in pieces:
            size += len(piece)
            if size > self._most:
                self._refuse()
            kept.append(piece)
        return self.made("".join(kept))

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902  (Jinja's way to leave all names to kwargs)
        own = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(own, "__self__", None)
        if owner is __self:
            return __obj(*args)  # tick, made and joined
        if isinstance(owner, (str, bytes, int)):
            args = [list(a) if isinstance(a, Iterator) else a for a in args]
            __self._foresee(own.__name__, owner, [*args, *kwargs.values()])
        return __self.made(super().call(__context, __obj, *args, **kwargs), owner)

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str):
            self._foresee("format", left, [right])
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"**": left.bit_length() * max(right, 0), "*": left.bit_length() + right.bit_length()}.get(operator, 0)
            if bits > BITS:
                self._refuse()
        elif operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(count, int):
                    self._allow(self._weigh(many) * abs(count))
        return self.made(super().call_binop(context, operator, left, right))

    def _watched(self, name, function):
        """The filter, its result weighed, and what it takes foreseen where it may grow."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context goes before the value

        @functools.wraps(function)
        def watched(*args, **kwargs):
            before, (value, *rest) = args[:skip], args[skip:]
            if name in ("join", "sum") and isinstance(value, Iterator):
                value = list(value)
            self._foresee(name, value, [*rest, *kwargs.values()])
            return self.made(function(*before, value, *rest, **kwargs), value)
        return watched

    # -- limits ------------------------------------------------------------------------------------------------------

    def _foresee(self, name: str, value, others: list) -> None:
        """Refuses what `value.name(*others)` or `value | name(*others)` would make too large."""
        numbers = [abs(a) for a in others if isinstance(a, int)]
        texts = [a for a in others if isinstance(a, str)]
        if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
            self._allow(sum(numbers))
        elif name in ("batch", "slice"):
            self._allow(sum(numbers) * 4 * ELEMENT)  # an empty list takes 56 bytes
        elif name == "round":
            self._allow(sum(numbers) ** 2)  # a power of ten
        elif name in ("rfind", "rindex", "rpartition", "rsplit") and texts and isinstance(value, str):
            self._allow(len(value) * (4 + len(texts[0]) / 64))  # Python searches backwards in quadratic time at worst
        elif name in ("encode", "decode") and texts and texts[0].lower() not in CODECS:
            self._allow(len(value) ** 2)
        elif name in ("split", "splitlines", "list", "sort", "unique", "reverse", "groupby") and isinstance(value, (str, bytes)):
            self._allow(len(value) * 4)
        elif name == "sum" and any(not isinstance(a, (int, float, str)) for a in others):  # of lists: each sum is a copy
            self._allow(self._weigh(value) * len(value) / 1024)
        elif name in ("expandtabs", "indent", "tojson", "translate"):
            self._allow(self._weigh(value) * max([1, *numbers, *map(self._weigh, (a for a in others if not isinstance(a, int)))]))
        elif name == "replace" and len(texts) > 1:
            self._allow(str(value).count(texts[0]) * len(texts[1]))
        elif name == "join":
            method = isinstance(value, (str, bytes)) and others and not isinstance(others[0], str)  # of the text between the items
            items, by = (others[0], value) if method else (value, "".join(texts))
            self._allow(self._weigh(items) * (1 + len(by)))
        elif name in ("format", "format_map") and isinstance(value, str):
            inner = "*" in value or re.search(r"\{[^{}]*:[^{}]*\{", value)  # a width that is itself an argument
            flat = [a for o in others for a in (o if isinstance(o, tuple) else [o])]
            widths = [int(d[:12]) for d in re.findall(r"\d+", value)] + [abs(a) for a in flat if inner and isinstance(a, int)]
            self._allow(sum(widths) + (value.count("%") + value.count("{")) * self._weigh(others))

    def _allow(self, size: float) -> None:
        if size > self._most:
            self._refuse()

    def _refuse(self):
        raise CapacityError(f"the chat template makes a text of more than {LARGEST >> 20} million characters and 16 times the conversation, "
                            f"an integer of more than {BITS} bits, or more than {IN_ALL >> 20} MiB in all; pass another with chat_template=")

    def _weigh(self, value) -> int:
        """The weight of a value as printing it would go through it: shared parts count as often as they occur."""
        weight, todo = 0, [value]
        while todo:
            item = todo.pop()
            weight += ELEMENT
            if type(item) in (list, tuple):  # the usual cases first: this is what takes the time
                todo += item
            elif isinstance(item, (str, bytes)):
                weight += len(item)
            elif isinstance(item, int):
                if item.bit_length() > BITS:
                    self._refuse()
            elif type(item) is Namespace:
                todo.append(item._Namespace__attrs)
            elif isinstance(item, Mapping):
                todo += item.keys()
                todo += item.values()
            elif isinstance(item, Iterable) and not isinstance(item, (Iterator, range, jinja2.Undefined)):
                todo += item
            if weight + ELEMENT * len(todo) > self._most:
                self._refuse()
        return weight

    def _generate(self, source, *args, **kwargs):
        """Jinja's hook between the syntax tree and the code."""
        return super()._generate(_Watch(self).visit(source), *args, **kwargs)


class _Watch(NodeTransformer):
    """Puts calls of Room's methods where a template repeats or makes something without calling anything."""

    def __init__(self, room: Room):
        self.room = room

    def _call(self, name: str, arguments: list, node):
        method = jinja2.nodes.EnvironmentAttribute(name, lineno=node.lineno)
        return jinja2.nodes.Call(method, arguments, [], None, None, lineno=node.lineno)

    def _repeats(self, node):
        node = self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(self._call("tick", [], node), lineno=node.lineno))
        return node

    def _makes(self, node):
        node = self.generic_visit(node)
        constant = all(isinstance(child, jinja2.nodes.Const) for child in node.iter_child_nodes())
        return node if constant or getattr(node, "ctx", "load") != "load" else self._call("made", [node], node)

    def visit_Concat(self, node):
        return self._call("joined", self.generic_visit(node).nodes, node)

    def visit_Getitem(self, node):
        return self._call("made", [self.generic_visit(node)], node) if isinstance(node.arg, jinja2.nodes.Slice) else self.generic_visit(node)

    visit_For = visit_Macro = visit_CallBlock = _repeats
    visit_List = visit_Tuple = visit_Dict = _makes


def _at_random(*_, **__):
    raise jinja2.exceptions.TemplateError("it draws at random, so that the same conversation would not give the same prompt")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
