"""Chat templates: which one applies, and the text that it makes of a conversation.

A template is a Jinja program that came with the checkpoint. It runs in Jinja's sandbox on plain JSON values only, so it
has no object to call into.
"""
import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import CheckpointError, UnsupportedError, UsageError

END_MARK = "\ue000end\ue000"  # private-use characters: shows where a template printed the end of a message


def read_templates(folder: Path, config: dict) -> dict[str, str]:
    """{"default": Jinja text, ...} of a tokenizer's folder; chat_template.jinja goes before tokenizer_config.json."""
    found = {}
    declared = config.get("chat_template")
    if isinstance(declared, str):
        found["default"] = declared
    elif isinstance(declared, list):
        found |= {entry["name"]: entry["template"] for entry in declared}
    older = folder / "chat_template.json"
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    try:
        if older.is_file():
            found["default"] = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
        return found | {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"the chat templates in {folder} are not readable: {e}; fetch them again or remove them") from e


def pick_template(templates: dict[str, str], wanted: str | None, with_tools: bool, name: str) -> str:
    """The Jinja text for a request: `wanted` as text or by name, else tool_use when there are tools, else default."""
    if wanted is not None:
        return templates.get(wanted, wanted)
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    has = f"has the templates {', '.join(sorted(templates))}, none of them default" if templates else "has no chat template"
    raise UsageError(f"tokenizer {name} {has}; pass chat_template= with Jinja text or a name, "
                     "or use generate() with a prompt that you format", "chat_template")


def messages_for_template(messages: Sequence[dict]) -> list[dict]:
    """The conversation as templates expect it: text parts joined, absent fields left out, tool arguments as objects."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError("messages must be a list with at least one {'role': ..., 'content': ...}", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: dict, where: str) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UsageError(f"{where} is {message!r:.80}; an object with a 'role' is needed", where)
    try:
        message = json.loads(json.dumps({key: value for key, value in message.items() if value is not None}))
    except (TypeError, ValueError) as e:
        raise UsageError(f"{where} holds something that JSON does not: {e}", where) from e
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(message["content"]))
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as e:
                raise UsageError(f"{where}.tool_calls has arguments that are not JSON: {e}", where) from e
    return message


def _text_of(part, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UnsupportedError(f"{where} is of type {kind!r}; jaxllm's models take text only")


def read_date(value: str | datetime.date | None) -> datetime.datetime:
    """The moment that `value` names: a date of Python's or ISO 8601 text; None: now, by the clock of this machine."""
    if value is None:
        return datetime.datetime.now()
    try:
        return datetime.datetime.fromisoformat(value.isoformat() if isinstance(value, datetime.date) else value)
    except (TypeError, ValueError):
        raise UsageError(f"chat_date={value!r}; it must be a date in ISO 8601, such as 2026-07-26 or 2026-07-26T09:30:00",
                         "chat_date") from None


def render(template: str, messages: list[dict], *, add_generation_prompt: bool, continue_final_message: bool,
           tools: list[dict] | None, now: datetime.datetime, variables: dict) -> tuple[str, bool]:
    """The text of a conversation, and whether the template asked what is `now`; it may use `variables` (bos_token, a caller's own)."""
    from jinja2.exceptions import TemplateError
    if continue_final_message:
        last = messages[-1]
        if not isinstance(last.get("content"), str):
            raise UsageError("continue_final_message needs a last message with text content", "continue_final_message")
        messages = [*messages[:-1], {**last, "content": last["content"] + END_MARK}]
    asked = []

    def strftime_now(format):
        asked.append(format)
        return now.strftime(format)

    try:
        text = _compiled(template).render(messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt,
                                          **{"documents": None, "strftime_now": strftime_now, **variables})
    except TemplateError as e:
        raise UsageError(f"the chat template refused the conversation: {e}", "messages") from e
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UsageError(f"the chat template failed on the conversation: {type(e).__name__}: {e}", "messages") from e
    if not continue_final_message:
        return text, bool(asked)
    if END_MARK not in text:
        raise UsageError("continue_final_message: the chat template does not print the end of the last message, "
                         "so it cannot be continued", "continue_final_message")
    return text[:text.rindex(END_MARK)], bool(asked)


@functools.lru_cache(maxsize=32)
def _compiled(template: str):
    """The template ready to render, in a sandbox that can neither change nor reach anything."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model wrote, for training; here it only shows its content."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def at_random(*_, **__):
        refuse("it draws at random, so that the same conversation would not give the same prompt")

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    room = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    room.filters["tojson"] = tojson  # Jinja's own escapes HTML
    room.globals["raise_exception"] = refuse
    room.filters["random"] = room.globals["lipsum"] = at_random
    try:
        return room.from_string(template)
    except jinja2.exceptions.TemplateError as e:
        raise UsageError(f"the chat template is not valid Jinja: {e}", "chat_template") from e
