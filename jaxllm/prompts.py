"""Prompts as callers, the shell and files give them: all are read and checked before any work starts."""
import codecs
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxllm.errors import UsageError, about
from jaxllm.sampling_params import SamplingParams, check_text, token_ids

SAMPLING_FIELDS = {f.name for f in dataclasses.fields(SamplingParams)}
PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line of a prompts file: the prompt, and what the line says of its own sampling."""

    prompt: str | dict | None            # a text or {"prompt_token_ids": ids}; None: messages
    messages: list[dict] | None
    sampling: dict                       # fields of SamplingParams
    where: str                           # "FILE:LINE" or "prompt N", for messages


def read_arguments(prompts: list[str]) -> list[PromptLine]:
    """The prompts of a command line; "-", and standard input where there is none and something is piped in, is one prompt."""
    piped = _piped() if "-" in prompts or not (prompts or _at_a_terminal()) else ""
    prompts = [_argument(text) for text in prompts] or (["-"] if piped else [])
    if prompts.count("-") > 1:
        raise UsageError("- is given twice; standard input can be read once")
    lines = [PromptLine(piped, None, {}, "standard input") if text == "-" else PromptLine(text, None, {}, f"prompt {i}")
             for i, text in enumerate(prompts, 1)]
    for line in lines:
        check_text(line.prompt, line.where)
    return lines


def _argument(text: str) -> str:
    """The text of an argument that came as UTF-8, also where the locale says that it is something else."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:  # the locale is not UTF-8, and neither is the text: Python has decoded it rightly
        return text


def _piped() -> str:
    """The text on standard input, without the newline that `echo` puts behind it."""
    return _utf8(_stdin(), "standard input").removesuffix("\n").removesuffix("\r")


def _at_a_terminal() -> bool:
    return sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()


def _stdin() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except (AttributeError, OSError, ValueError):  # there is none, or it is not for reading, or closed
        return b""


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{where}: byte {e.start} (0x{e.object[e.start]:02x}) is not UTF-8; save the text as UTF-8") from e


def read_prompts(name: str) -> list[PromptLine]:
    """The prompts of a JSONL file, or of standard input for "-". Raises UsageError naming the first bad line.

    A line is a JSON text, or an object with "prompt", "prompt_token_ids" or "messages" and any fields of SamplingParams.
    """
    label = "standard input" if name == "-" else name
    try:
        data = _stdin() if name == "-" else Path(name).read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read the prompts file {name}: {e.strerror}; give a JSONL file or - for standard input") from e
    lines = [_line(raw, f"{label}:{number}") for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1) if raw.strip()]
    if not lines:
        raise UsageError(f"{label} holds no prompts; put one JSON text or object on each line")
    return lines


def _line(raw: bytes, where: str) -> PromptLine:
    try:
        value = json.loads(_utf8(raw, where))
    except UsageError:
        raise
    except (ValueError, RecursionError) as e:  # a number of too many digits is a ValueError
        raise UsageError(f"{where}: not JSON ({e}); each line must be a JSON text or object") from e
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a JSON {type(value).__name__}; each line must be a text or an object with 'prompt'")
    try:
        check_text(json.dumps(value, ensure_ascii=False), where)
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply; messages are a few levels deep") from None
    given = [name for name in PROMPT_FIELDS if name in value]
    if len(given) != 1:
        raise UsageError(f"{where}: has {' and '.join(given) or 'no prompt'}; it must have exactly one of {', '.join(PROMPT_FIELDS)}")
    unknown = sorted(set(value) - SAMPLING_FIELDS - set(PROMPT_FIELDS))
    if unknown:
        raise UsageError(f"{where}: unknown field {unknown[0]!r:.80}; allowed: {', '.join(PROMPT_FIELDS)} and sampling parameters")
    kind, content = given[0], value[given[0]]
    if kind == "prompt" and not isinstance(content, str):
        raise UsageError(f"{where}: prompt is a {type(content).__name__}; it must be a text")
    if kind == "prompt_token_ids" and not (isinstance(content, list) and all(type(t) is int for t in content)):
        raise UsageError(f"{where}: prompt_token_ids must be a list of integers")
    if kind == "messages" and not (isinstance(content, list) and content and all(isinstance(m, dict) for m in content)):
        raise UsageError(f"{where}: messages must be a list of objects with role and content")
    sampling = {k: v for k, v in value.items() if k in SAMPLING_FIELDS}
    prompt = content if kind == "prompt" else {kind: content} if kind == "prompt_token_ids" else None
    return PromptLine(prompt, content if kind == "messages" else None, sampling, where)


def sampling_of(line: PromptLine, common: dict) -> SamplingParams:
    """The line's SamplingParams over the common ones; an error names the line."""
    with about(line.where):
        return SamplingParams(**{**common, **line.sampling})


# -- in Python ---------------------------------------------------------------------------------------------------------------


def in_tokens(prompts, encode: Callable[[str], list[int]], vocab_size: int) -> list[tuple[str | None, list[int]]]:
    """[(text or None, token ids)] of one prompt, or of each of many; errors say of which."""
    prompts, out = _one_by_one(prompts), []
    for index, prompt in enumerate(prompts):
        with about(f"prompts[{index}]" if len(prompts) > 1 else None, index):
            text, ids = _text_or_ids(prompt)
            ids = encode(text) if ids is None else ids
            if outside := [token for token in ids if not 0 <= token < vocab_size]:
                raise UsageError(f"prompt_token_ids holds {outside[0]!r:.40}; the model's tokens are 0 to {vocab_size - 1}", "prompt")
        out.append((text, ids))
    return out


def _one_by_one(prompts) -> list:
    if isinstance(prompts, (str, bytes, bytearray, dict)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise UsageError(f"prompts is a {type(prompts).__name__}; it must be a text, token ids, or a list of these", "prompt")
    prompts = prompts.tolist() if callable(getattr(prompts, "tolist", None)) else list(prompts)
    number = prompts and (isinstance(prompts[0], (int, float)) or getattr(prompts[0], "shape", None) == ())  # NumPy's and JAX's have no dimensions
    return [prompts] if number else prompts


def _text_or_ids(prompt) -> tuple[str | None, list[int] | None]:
    """A prompt in any of its forms as its text, its token ids or both."""
    if isinstance(prompt, dict):
        if set(prompt) - {"prompt", "prompt_token_ids"} or not prompt:
            raise UsageError(f"a prompt has the keys {sorted(map(str, prompt))}; it must have 'prompt' or 'prompt_token_ids'", "prompt")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    else:
        text, ids = (prompt, None) if isinstance(prompt, (str, bytes, bytearray)) else (None, prompt)
    if ids is not None:
        return text, token_ids("prompt_token_ids", ids)
    if not isinstance(text, str):
        raise UsageError(f"a prompt is a {type(text).__name__}; it must be a text or a list of token ids", "prompt")
    check_text(text, "the prompt")
    return text, None
