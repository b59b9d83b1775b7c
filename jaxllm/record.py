"""Logs of requests with the bits they got, and their replay: `generate --record` writes them, `jaxllm verify` compares."""
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

from jaxllm.errors import JaxllmError, UsageError, about
from jaxllm.sampling_params import SamplingParams

VERSION = 1
FIELDS = {"version", "index", "model", "dtype", "prompt_token_ids", "sampling", "seed", "outputs", "system_fingerprint", "fingerprint_parts"}
SAMPLING = {f.name: f.default for f in dataclasses.fields(SamplingParams)}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first place where a replay parts from its record."""

    line: int
    choice: int
    position: int                       # of the token in the output
    tokens: tuple[int | None, int | None]         # recorded, replayed; None: that side had ended
    logprobs: tuple[str | None, str | None]       # hexadecimal floats


def sampling_fields(params: SamplingParams) -> dict:
    """The fields that differ from their defaults, as JSON holds them."""
    normal = SamplingParams()
    out = {name: getattr(params, name) for name in SAMPLING if getattr(params, name) != getattr(normal, name)}
    return {k: {str(t): b for t, b in v.items()} if k == "logit_bias" else v for k, v in out.items()}


def entry(index: int, llm, params: SamplingParams, output) -> dict:
    """One request as a line of a log. The output must have logprobs."""
    return {
        "version": VERSION, "index": index, "model": llm.model, "dtype": str(llm.params.embedding.dtype),
        "prompt_token_ids": output.prompt_token_ids, "sampling": sampling_fields(params), "seed": output.seed,
        "outputs": [_bits(o) for o in output.outputs],
        "system_fingerprint": output.system_fingerprint, "fingerprint_parts": llm.fingerprint_parts,
    }


def _bits(choice) -> dict:
    return {"token_ids": choice.token_ids, "finish_reason": choice.finish_reason,
            "logprobs": [row[token].logprob.hex() for token, row in zip(choice.token_ids, choice.logprobs, strict=True)]}


def read_log(path: str) -> tuple[list[tuple[int, dict]], list[str]]:
    """[(line number, entry)] and warnings. A last line that was cut off is left out; any other bad line is a UsageError."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise UsageError(f"cannot read the log {path}: {e.strerror}") from e
    entries, warnings = [], []
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw)
        except ValueError as e:
            if number == len(lines):  # no newline behind it: the writer was interrupted
                warnings.append(f"{path}:{number}: cut off, left out")
                continue
            raise UsageError(f"{path}:{number}: not JSON ({e})") from e
        _check(value, f"{path}:{number}")
        entries.append((number, value))
    if not entries:
        raise UsageError(f"{path} holds no requests; write one with: jaxllm generate --record {path}")
    return entries, warnings


def _check(value, where: str) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a JSON {type(value).__name__}; each line must be an object")
    if value.get("version") != VERSION:
        raise UsageError(f"{where}: field 'version' is {value.get('version')!r}; this jaxllm reads version {VERSION}")
    unknown, missing = sorted(set(value) - FIELDS), sorted(FIELDS - set(value))
    if unknown:
        raise UsageError(f"{where}: unknown field {unknown[0]!r}; a record has {', '.join(sorted(FIELDS))}")
    if missing:
        raise UsageError(f"{where}: field {missing[0]!r} is missing")
    strange = sorted(set(value["sampling"]) - set(SAMPLING))
    if strange:
        raise UsageError(f"{where}: unknown sampling parameter {strange[0]!r}")


def replay(llm, entries: list[tuple[int, dict]], *, batch_size: int, shuffle_seed: int | None = None) -> Iterator[tuple[int, Difference | None]]:
    """(line, first difference or None) of each entry, replayed `batch_size` at a time, in random order with a shuffle_seed."""
    order = list(entries)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        part = order[start:start + batch_size]
        prompts = [{"prompt_token_ids": e["prompt_token_ids"]} for _, e in part]
        params = [_params(e, line) for line, e in part]
        try:
            outputs = llm.generate(prompts, params)
        except JaxllmError as e:
            e.where = e.where if e.index is None else f"line {part[e.index][0]}"
            raise
        for (line, e), output in zip(part, outputs, strict=True):
            yield line, compare(line, e["outputs"], [_bits(o) for o in output.outputs])


def _params(e: dict, line: int) -> SamplingParams:
    with about(f"line {line}"):
        return SamplingParams(**{**e["sampling"], "seed": e["seed"], "logprobs": e["sampling"].get("logprobs") or 0})


def compare(line: int, recorded: list[dict], replayed: list[dict]) -> Difference | None:
    """Where two answers first differ, in tokens or in logprob bits."""
    for choice, (a, b) in enumerate(zip(recorded, replayed, strict=True)):
        for position in range(max(len(a["token_ids"]), len(b["token_ids"]))):
            pairs = [tuple(side[name][position] if position < len(side[name]) else None for side in (a, b)) for name in ("token_ids", "logprobs")]
            if any(x != y for x, y in pairs):
                return Difference(line, choice, position, *pairs)
    return None
