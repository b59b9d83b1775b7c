"""Chat templates: which one applies, and the text that it makes of a conversation.

A template is a Jinja program that came with the checkpoint. It runs in a sandbox (sandbox.py) on plain JSON values only, so
it has no object to call into, and within limits of time and memory. What it is given is what transformers gives it.
"""
import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxllm.errors import CapacityError, CheckpointError, JaxllmError, UnsupportedError, UsageError

END_MARK = "\ue000end\ue000 "  # private-use characters and a space: where a template printed the end of a message, and if it trimmed
LONGEST = 1 << 17              # characters of a template; published ones have at most some ten thousand
LONGEST_DATE = 1 << 10         # characters of a date's format: the system's strftime gives up to 256 for each
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names of one field; templates read the first or the second
PLAIN = {str: str.__str__, int: int.__int__, float: float.__float__}
MEDIA = ("image", "audio", "video", "file")


def read_templates(folder: Path, config: dict) -> dict[str, str]:
    """{"default": Jinja text, ...} of a tokenizer's folder.

    chat_template.jinja and additional_chat_templates/ stand for all that tokenizer_config.json has; chat_template.json,
    which belongs to a processor, counts where there is nothing else.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    older = folder / "chat_template.json"
    try:
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        if not found:
            found = _declared(config.get("chat_template"), folder / "tokenizer_config.json")
        if not found and older.is_file():
            found = _declared(json.loads(older.read_text(encoding="utf-8"))["chat_template"], older)
        "".join(found.values()).encode()  # no half of a surrogate pair
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"the chat templates in {folder} are not readable: {e}; fetch them again or remove them") from e
    return found


def _declared(value, file: Path) -> dict[str, str]:
    """The templates in a field `chat_template`: a text, a list of {"name", "template"}, or none."""
    if value is None or isinstance(value, str):
        return {} if value is None else {"default": value}
    entries = value.items() if isinstance(value, dict) else [
        (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, entry)
        for entry in (value if isinstance(value, list) else [value])]
    for i, (name, template) in enumerate(entries):
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(f"{file}: chat_template[{i}] is {{'name': {name!r:.40}, 'template': {template!r:.40}}}; both must be texts")
    return dict(entries)


def pick_template(templates: dict[str, str], wanted: str | None, with_tools: bool, name: str) -> str:
    """The Jinja text for a request: `wanted` as text or by name, else tool_use when there are tools, else default."""
    if wanted is not None and not isinstance(wanted, str):
        raise UsageError(f"chat_template is a {type(wanted).__name__}; it must be Jinja text or the name of a template", "chat_template")
    if wanted is not None:
        return templates.get(wanted, wanted)
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    has = f"has the templates {', '.join(map(repr, sorted(templates)))}, none of them default" if templates else "has no chat template"
    raise UsageError(f"tokenizer {name} {has}; pass chat_template= with Jinja text or a name, "
                     "or use generate() with a prompt that you format", "chat_template")


def messages_for_template(messages: Sequence[dict]) -> list[dict]:
    """The conversation as templates expect it: plain JSON values, absent fields left out, tool arguments as objects."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise UsageError("messages must be a list with at least one {'role': ..., 'content': ...}", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message, where: str) -> dict:
    message = plain(message, where)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UsageError(f"{where} is {message!r:.80}; an object with a 'role' is needed", where)
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("content"), (list, tuple)):
        for i, part in enumerate(message["content"]):
            _refuse_media(part, f"{where}.content[{i}]")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise UsageError(f"{where}.tool_calls is {calls!r:.80}; a list of objects is needed", where)
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError) as e:
                raise UsageError(f"{where}.tool_calls has arguments that are not JSON: {e}", where) from e
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def plain(value, where: str):
    """The value out of JSON's types alone; objects with fields (dataclasses, pydantic's) become objects of JSON."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    for kind, bare in PLAIN.items():  # enums and some of numpy's numbers are of a class of their own
        if isinstance(value, kind):
            return bare(value)
    if isinstance(value, Mapping):
        return {plain(k, where): plain(v, where) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v, where) for v in value) if type(value) in (list, tuple) else [plain(v, where) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), where) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump(), where)
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return plain(value.item(), where)
    raise UsageError(f"{where} holds a {type(value).__name__}, which JSON does not; give texts, numbers, lists and objects", where)


def _as_the_template_takes_it(messages: list[dict], template: str) -> list[dict]:
    """Content given as parts stays parts for a template that reads them, as in transformers.

    For one that takes texts alone (transformers then prints the list as Python writes it) they are joined by newlines, as in vLLM.
    """
    if not any(isinstance(message.get("content"), (list, tuple)) for message in messages) or _reads_parts(template):
        return messages
    return [{**m, "content": "\n".join(_text_of(part, f"messages[{i}].content[{j}]") for j, part in enumerate(m["content"]))}
            if isinstance(m.get("content"), (list, tuple)) else m for i, m in enumerate(messages)]


@functools.lru_cache(maxsize=32)
def _reads_parts(template: str) -> bool:
    """Whether the template looks for the `text` of something, as all do that take content in parts."""
    import jinja2.nodes
    tree = _compiled(template).environment.parse(template)
    return any(node.attr == "text" for node in tree.find_all(jinja2.nodes.Getattr)) or \
        any(node.value == "text" for node in tree.find_all(jinja2.nodes.Const))


def _refuse_media(part, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    found = kind if isinstance(kind, str) and kind.removeprefix("input_").startswith(MEDIA) else next(
        (key for key in (part if isinstance(part, dict) and kind is None else ()) if isinstance(key, str) and key.startswith(MEDIA)), None)
    if found:
        raise UnsupportedError(f"{where} is of type {found!r}; jaxllm's models take text only")


def _text_of(part, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UnsupportedError(f"{where} is of type {kind!r}; this chat template takes texts only")


def read_date(value: str | datetime.date | None) -> datetime.datetime:
    """The moment that `value` names: a date of Python's or ISO 8601 text; None: now, by the clock of this machine."""
    if value is None:
        return datetime.datetime.now()
    try:
        return datetime.datetime.fromisoformat(value.isoformat() if isinstance(value, datetime.date) else value)
    except (TypeError, ValueError):
        raise UsageError(f"chat_date={value!r:.80}; it must be a date in ISO 8601, such as 2026-07-26 or 2026-07-26T09:30:00",
                         "chat_date") from None


def render(template: str, messages: list[dict], *, add_generation_prompt: bool, continue_final_message: bool | str,
           tools: list[dict] | None, now: datetime.datetime, variables: dict) -> tuple[str, bool]:
    """The text of a conversation, and whether the template asked what is `now`; it may use `variables` (bos_token, a caller's own).

    continue_final_message: the text ends where the content of the last message does, or the field that it names.
    """
    compiled = _compiled(template)
    messages, last = _as_the_template_takes_it(messages, template), ""
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        messages, last = _with_end_mark(messages, field, template)
    asked = []

    def strftime_now(format):
        if len(format) > LONGEST_DATE:
            raise CapacityError(f"the chat template writes the date in a format of {len(format)} characters; at most {LONGEST_DATE}")
        asked.append(format)
        return now.strftime(format)

    values = {"documents": None, "strftime_now": strftime_now, **variables, "messages": messages, "tools": tools,
              "add_generation_prompt": add_generation_prompt}
    from jinja2.exceptions import TemplateError
    try:
        text = compiled.environment.run(compiled, values)
    except JaxllmError:
        raise
    except TemplateError as e:
        raise UsageError(f"the chat template refused the conversation: {_one_line(e)}", "messages") from e
    except Exception as e:  # a template is a program: it can fail in any way that Python has
        raise UsageError(f"the chat template failed on the conversation: {type(e).__name__}: {_one_line(e)}", "messages") from e
    if not continue_final_message:
        return text, bool(asked)
    if END_MARK.strip() not in text or last.strip() not in text:
        raise UsageError("continue_final_message: the chat template does not print the last message to its end, "
                         "so it cannot be continued", "continue_final_message")
    at = text.rindex(END_MARK.strip())
    cut = text[:at] if text.startswith(END_MARK, at) else text[:at].rstrip()  # a template that trims took the mark's space away
    return cut, bool(asked)


def _with_end_mark(messages: list[dict], field: str, template: str) -> tuple[list[dict], str]:
    """The messages with a mark after the text to be continued, and that text."""
    value = messages[-1].get(field)
    names = [n for n in REASONING if messages[-1].get(n) == value] if field in REASONING else [field]
    if not any(name in template for name in names):
        raise UsageError(f"continue_final_message: the chat template does not print the field {field!r}", "continue_final_message")
    if isinstance(value, str):
        return [*messages[:-1], {**messages[-1], **dict.fromkeys(names, value + END_MARK)}], value
    parts = list(value) if isinstance(value, (list, tuple)) else []
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], dict) and isinstance(text := parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": text + END_MARK}
            return [*messages[:-1], {**messages[-1], field: parts}], text
    raise UsageError(f"continue_final_message needs a last message with text in the field {field!r}", "continue_final_message")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@functools.lru_cache(maxsize=32)
def _compiled(template: str):
    """The template ready to render, in a sandbox that can neither change nor reach anything."""
    import jinja2

    from jaxllm.text.sandbox import Room

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    if len(template) > LONGEST:
        raise UsageError(f"the chat template has {len(template)} characters; at most {LONGEST}", "chat_template")
    room = Room()
    room.globals["raise_exception"] = refuse
    try:
        return room.from_string(template)
    except Exception as e:  # not all that Jinja's and Python's compilers refuse is a TemplateError
        raise UsageError(f"the chat template is not valid Jinja: {_one_line(e)}", "chat_template") from e
