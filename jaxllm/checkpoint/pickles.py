"""Values of a pickle, built by a closed machine: plain containers, scalars, and what a given table of globals allows.

Python's own unpickler imports what a file names and calls it. This one imports nothing: a global is a key of a table
that the caller gives, and a key that is not there ends the load with its name before anything else happens. It also
bounds what a hostile file can cost: no opcode makes more than its own bytes warrant, calls are given no more than the
pickle has bytes, the memo is a dict (so that a huge index costs nothing), and dict keys are scalars and short tuples of
them (a nest of shared tuples takes 2**depth steps to hash).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.mapped import brief
from jaxllm.errors import CheckpointError, UnsupportedError

# A tensor of a state dict takes about 25 opcodes and 150 bytes: this is room for 400k tensors, and one gigabyte of
# the smallest Python objects at worst.
MAX_OPCODES = 10_000_000
MAX_BYTES = 256 << 20
MAX_NAME_BYTES = 4096
MAX_KEY_PARTS = 64  # of a tuple that is a dict key, counted through all its levels
GIVEN_FREE = 4096  # entries that calls may be given more than the pickle has bytes, so that short ones need no care
_MARK = object()
_SIZED = (str, bytes, list, tuple, dict)


@dataclass(frozen=True)
class Allowed:
    """A callable global: `build(*args)` makes its value, raising TypeError or ValueError for arguments it refuses."""

    name: str
    build: Callable[..., object]


class Unread:
    """A value that no state dict needs, of which nothing is kept: sets, and what is made of bytes."""


UNREAD = Unread()


class Truncated(Exception):
    """The bytes end inside a value."""


def read_pickle(
    data: np.ndarray, start: int, allowed: Mapping[str, object], where: str, load_persistent: Callable[[object], object]
) -> tuple[object, int]:
    """The value of the pickle that begins at `start`, and where it ends; `allowed` maps "module.name" to a value.

    `where` begins every error. `load_persistent` turns a persistent id (what torch writes for a storage) into a value.
    """
    machine = _Machine(data, start, allowed, where, load_persistent)
    try:
        return machine.run(), machine.position
    except Truncated as error:
        raise CheckpointError(f"{where} is truncated inside a pickle at byte {machine.position}; fetch the file again") from error
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        # An operation on an empty stack, a memo that was never set, text that is not UTF-8, arguments that do not fit.
        raise CheckpointError(f"{where} holds a damaged pickle near byte {machine.position}: {brief(str(error))}; fetch it again") from error


class _Machine:
    def __init__(self, data, start, allowed, where, load_persistent):
        # A memoryview: indexing it costs a tenth of slicing an array, and a large model's pickle has millions of opcodes.
        self.data, self.position, self.end = memoryview(data), start, min(data.size, start + MAX_BYTES)
        self.start, self.given = start, 0
        self.allowed, self.where, self.load_persistent = allowed, where, load_persistent
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            if self.position >= self.end:
                raise self.ended()
            code = self.data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.stack[0] is _MARK:
                    raise ValueError("it ends with other than one value")
                return self.stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise CheckpointError(f"{self.where} uses the pickle opcode 0x{code:02x}, which no torch checkpoint needs; it is refused")
            operation(self)
        raise CheckpointError(f"{self.where} holds a pickle of more than {MAX_OPCODES} operations, which is refused")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.end:
            raise self.ended()
        taken = self.data[self.position : end].tobytes()
        self.position = end
        return taken

    def ended(self) -> Exception:
        if self.end == self.data.nbytes:
            return Truncated()
        return CheckpointError(f"{self.where} holds a pickle of more than {MAX_BYTES} bytes, which is refused")

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> str:
        window = self.data[self.position : min(self.position + MAX_NAME_BYTES, self.end)].tobytes()
        end = window.find(b"\n")
        if end < 0 and len(window) < MAX_NAME_BYTES:
            raise self.ended()
        if end < 0:
            raise ValueError(f"a name of more than {MAX_NAME_BYTES} bytes")
        self.position += end + 1
        return window[:end].decode("utf-8")

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing before a mark")
        return value

    def pop_to_mark(self) -> list[object]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def push(self, value: object) -> None:
        self.stack.append(value)

    def find_global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise CheckpointError(
                f"{self.where} asks for the global {brief(full)}, which is not on the list of what a checkpoint may name; it was "
                "refused and nothing was executed; save the model's state_dict() alone, or convert it where you trust it"
            )
        value = self.allowed[full]
        if isinstance(value, UnsupportedError):
            raise UnsupportedError(f"{self.where} asks for {full}: {value}")
        self.push(value)

    def call(self, function: object, args: object) -> None:
        if not isinstance(function, Allowed) or not isinstance(args, tuple):
            raise CheckpointError(f"{self.where} calls {_title(function)}, which is not a function of the list; refused, nothing was executed")
        # A value may be named again for two bytes and copied by each call: honest ones are given what they were written with.
        self.given += sum(len(arg) for arg in args if isinstance(arg, _SIZED))
        if self.given > self.position - self.start + GIVEN_FREE:
            raise CheckpointError(f"{self.where} gives its calls more than its own bytes hold, over and over; refused")
        try:
            self.push(function.build(*args))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.where} gives {function.name} arguments it does not take: {brief(str(error))}") from error

    def set_items(self, target: object, pairs: list[object]) -> None:
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError(f"items are set on {_title(target)}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not _is_key(key):
                raise ValueError(f"a dict key is {_title(key)}; only text, numbers and short tuples of them are allowed")
            target[key] = value

    def extend(self, target: object, values: list[object]) -> None:
        if type(target) is not list:
            raise ValueError(f"values are appended to {_title(target)}")
        target.extend(values)

    def build(self) -> None:
        self.pop()  # the state: torch hangs version metadata on a state dict, which says nothing about its tensors
        if type(self.stack[-1]) is not dict:
            raise CheckpointError(f"{self.where} sets the state of {_title(self.stack[-1])}; only a dict may have one; nothing was executed")


def _is_key(key: object) -> bool:
    """Whether `key` costs little to hash: a scalar, or a tuple of at most MAX_KEY_PARTS of them."""
    todo, parts = [key], 0
    while todo:
        part = todo.pop()
        parts += 1
        if isinstance(part, tuple) and parts + len(todo) + len(part) <= MAX_KEY_PARTS:
            todo.extend(part)
        elif not isinstance(part, str | int | float | complex | bytes | None):
            return False
    return True


def _title(value: object) -> str:
    return value.name if isinstance(value, Allowed) else brief(value)


def _unicode(machine: _Machine, width: int) -> None:
    machine.push(machine.take(machine.number(width)).decode("utf-8", "surrogatepass"))


def _bytes(machine: _Machine, width: int) -> None:
    machine.push(machine.take(machine.number(width)))


def _text_string(machine: _Machine) -> None:
    line = machine.line()
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"" or "\\" in line:
        raise ValueError("a quoted string that is not plain")
    machine.push(line[1:-1])


def _text_int(machine: _Machine) -> None:
    line = machine.line()
    machine.push({"00": False, "01": True}[line] if line in ("00", "01") else _small_int(line))


def _small_int(line: str) -> int:
    if len(line) > 40:
        raise ValueError("an integer of more than 40 digits")
    return int(line.removesuffix("L"))


def _long4(machine: _Machine) -> None:
    length = machine.number(4, signed=True)
    if not 0 <= length <= 255:
        raise ValueError(f"an integer of {length} bytes")
    machine.push(machine.number(length, signed=True))


def _tuple_of(machine: _Machine, count: int) -> None:
    machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


def _put(machine: _Machine, index: int) -> None:
    if machine.stack[-1] is _MARK:
        raise ValueError("a mark is remembered")
    machine.memo[index] = machine.stack[-1]


def _global_from_stack(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str or len(name) + len(module) > MAX_NAME_BYTES:
        raise ValueError("a global whose name is not text")
    machine.find_global(module, name)


def _reduce(machine: _Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.call(function, args)


def _setitem(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _setitems(machine: _Machine) -> None:
    pairs = machine.pop_to_mark()
    machine.set_items(machine.stack[-1], pairs)


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.extend(machine.stack[-1], [value])


def _appends(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.extend(machine.stack[-1], values)


def _dict_from_mark(machine: _Machine) -> None:
    pairs = machine.pop_to_mark()
    machine.push({})
    machine.set_items(machine.stack[-1], pairs)


def _add_items(machine: _Machine) -> None:
    machine.pop_to_mark()
    if machine.stack[-1] is not UNREAD:
        raise ValueError(f"items are added to {_title(machine.stack[-1])}")


def _frozen_set(machine: _Machine) -> None:
    machine.pop_to_mark()
    machine.push(UNREAD)


def _protocol(machine: _Machine) -> None:
    if (version := machine.take(1)[0]) > 5:
        raise ValueError(f"pickle protocol {version}, newer than 5")


# What each opcode does, under the names of pickletools. Absent on purpose: INST, OBJ, NEWOBJ, NEWOBJ_EX (objects of
# classes), PERSID (text ids), EXT1/2/4 (a registry of this process), NEXT_BUFFER, READONLY_BUFFER (outside data).
_OPERATIONS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _protocol,  # PROTO
    0x95: lambda m: m.take(8) and None,  # FRAME: a hint for buffering
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.stack.pop() and None,  # POP, which may also take a mark
    ord("1"): lambda m: m.pop_to_mark() and None,  # POP_MARK
    ord("2"): lambda m: m.push(m.stack[-1]),  # DUP
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): _text_int,
    ord("L"): lambda m: m.push(_small_int(m.line())),
    ord("J"): lambda m: m.push(m.number(4, signed=True)),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: lambda m: m.push(m.number(m.number(1), signed=True)),  # LONG1
    0x8B: _long4,
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(float(np.frombuffer(m.take(8), ">f8")[0])),  # BINFLOAT
    ord("S"): _text_string,
    ord("T"): lambda m: _unicode(m, 4),  # BINSTRING, text of Python 2
    ord("U"): lambda m: _unicode(m, 1),  # SHORT_BINSTRING
    ord("V"): lambda m: m.push(m.line()),  # UNICODE
    ord("X"): lambda m: _unicode(m, 4),  # BINUNICODE
    0x8C: lambda m: _unicode(m, 1),  # SHORT_BINUNICODE
    0x8D: lambda m: _unicode(m, 8),  # BINUNICODE8
    ord("B"): lambda m: _bytes(m, 4),  # BINBYTES
    ord("C"): lambda m: _bytes(m, 1),  # SHORT_BINBYTES
    0x8E: lambda m: _bytes(m, 8),  # BINBYTES8
    0x96: lambda m: _bytes(m, 8),  # BYTEARRAY8
    0x8F: lambda m: m.push(UNREAD),  # EMPTY_SET
    0x90: _add_items,  # ADDITEMS
    0x91: _frozen_set,  # FROZENSET
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: lambda m: _tuple_of(m, 1),
    0x86: lambda m: _tuple_of(m, 2),
    0x87: lambda m: _tuple_of(m, 3),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.pop_to_mark()),  # LIST
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): lambda m: m.push({}),
    ord("d"): _dict_from_mark,  # DICT
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord("p"): lambda m: _put(m, _small_int(m.line())),  # PUT
    ord("q"): lambda m: _put(m, m.number(1)),  # BINPUT
    ord("r"): lambda m: _put(m, m.number(4)),  # LONG_BINPUT
    0x94: lambda m: _put(m, len(m.memo)),  # MEMOIZE
    ord("g"): lambda m: m.push(m.memo[_small_int(m.line())]),  # GET
    ord("h"): lambda m: m.push(m.memo[m.number(1)]),  # BINGET
    ord("j"): lambda m: m.push(m.memo[m.number(4)]),  # LONG_BINGET
    ord("c"): lambda m: m.find_global(m.line(), m.line()),  # GLOBAL
    0x93: _global_from_stack,  # STACK_GLOBAL
    ord("R"): _reduce,
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.push(m.load_persistent(m.pop())),  # BINPERSID
}
