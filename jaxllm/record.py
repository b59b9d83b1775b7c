"""Logs of requests with the bits they got, and their replay: `generate --record` writes them, `jaxllm verify` compares."""
import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxllm.errors import JaxllmError, UsageError, about
from jaxllm.sampling_params import SamplingParams

VERSION = 1
# field -> what JSON must hold there. The optional ones came later: logs without them are as good as ever.
FIELDS = {"version": int, "index": int, "model": str, "dtype": str, "prompt_token_ids": list, "sampling": dict, "seed": int, "outputs": list,
          "system_fingerprint": str, "fingerprint_parts": dict}
OPTIONAL = {"chat_date": str}  # what the chat template that made the prompt was told is now
OUTPUT = {"token_ids": list, "finish_reason": str, "logprobs": list}
OUTPUT_OPTIONAL = {"logits_digests": list}
ELEMENTS = {"token_ids": (r"\d+", "an integer"), "logprobs": (r'"-?(0x[01]\.[0-9a-f]+p[+-]\d+|inf|nan)"', "a hexadecimal float as text"),
            "logits_digests": (r'"[0-9a-f]{16}"', "a text of 16 hexadecimal digits")}  # as JSON writes them
# What is compared, each on its own: an answer's tokens and its end, their logprobs, and whole rows of logits by their digests.
KINDS = {"tokens": lambda o: [*o["token_ids"], o["finish_reason"]], "logprobs": lambda o: o["logprobs"],
         "logits": lambda o: o["logits_digests"]}
SAMPLING = {f.name: f.default for f in dataclasses.fields(SamplingParams)}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first place where a replay parts from its record; each pair is (recorded, replayed), None where that side had ended."""

    line: int
    choice: int
    position: int                       # of the token in the output
    tokens: tuple[int | str | None, int | str | None]  # behind the last token stands the finish reason
    logprobs: tuple[str | None, str | None]            # hexadecimal floats
    logits: tuple[str | None, str | None] = (None, None)  # digests of whole rows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A replayed request against its record: for each of KINDS compared whether all of it is equal, and where they first differ."""

    line: int
    equal: dict[str, bool]
    first: Difference | None


def sampling_fields(params: SamplingParams) -> dict:
    """The fields that differ from their defaults, as JSON holds them."""
    normal = SamplingParams()
    out = {name: getattr(params, name) for name in SAMPLING if getattr(params, name) != getattr(normal, name)}
    return {k: {str(t): b for t, b in v.items()} if k == "logit_bias" else v for k, v in out.items()}


def entry(index: int, llm, params: SamplingParams, output) -> dict:
    """One request as a line of a log. The output must have logprobs."""
    line = {
        "version": VERSION, "index": index, "model": llm.model, "dtype": str(llm.params.embedding.dtype),
        "prompt_token_ids": output.prompt_token_ids, "sampling": sampling_fields(params), "seed": output.seed,
        "outputs": [_bits(o) for o in output.outputs],
        "system_fingerprint": output.system_fingerprint, "fingerprint_parts": llm.fingerprint_parts,
    }
    return line if output.chat_date is None else {**line, "chat_date": output.chat_date}


def _bits(choice) -> dict:
    out = {"token_ids": choice.token_ids, "finish_reason": choice.finish_reason,
           "logprobs": [row[token].logprob.hex() for token, row in zip(choice.token_ids, choice.logprobs, strict=True)]}
    return out if choice.logits_digests is None else {**out, "logits_digests": choice.logits_digests}


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
    _fields(value, FIELDS, OPTIONAL, where, "a record")
    strange = sorted(set(value["sampling"]) - set(SAMPLING))
    if strange:
        raise UsageError(f"{where}: unknown sampling parameter {strange[0]!r}")
    with about(where):
        choices = _params(value).n
    if len(value["outputs"]) != choices:
        raise UsageError(f"{where}: field 'outputs' holds {len(value['outputs'])} and sampling asks for n={choices}")
    for i, output in enumerate(value["outputs"]):
        here = f"{where}: outputs[{i}]"
        _fields(output, OUTPUT, OUTPUT_OPTIONAL, here, "an output")
        for name in [name for name in ELEMENTS if name in output]:
            if len(output[name]) != len(output["token_ids"]):
                raise UsageError(f"{here}: field {name!r} holds {len(output[name])} for {len(output['token_ids'])} tokens; "
                                 "one for each is needed")
            pattern, said = ELEMENTS[name]
            strange = next((text for text in map(json.dumps, output[name]) if not re.fullmatch(pattern, text)), None)
            if strange is not None:
                raise UsageError(f"{here}: field {name!r} holds {strange:.40}; it must be {said}")


def _fields(value, needed: dict, optional: dict, where: str, what: str) -> None:
    """Raises UsageError for a field that is missing, unknown, or of another type than `needed` and `optional` say."""
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a JSON {type(value).__name__}; {what} must be an object")
    known = needed | optional
    unknown, missing = sorted(set(value) - set(known)), sorted(set(needed) - set(value))
    if unknown:
        raise UsageError(f"{where}: unknown field {unknown[0]!r}; {what} has {', '.join(sorted(known))}")
    if missing:
        raise UsageError(f"{where}: field {missing[0]!r} is missing")
    for name, content in value.items():
        if type(content) is not known[name]:
            raise UsageError(f"{where}: field {name!r} is a JSON {type(content).__name__}; it must be a {known[name].__name__}")


def replay(llm, entries: list[tuple[int, dict]], *, batch_size: int, shuffle_seed: int | None = None,
           kinds: Sequence[str] = ("tokens", "logprobs")) -> Iterator[Comparison]:
    """How each entry, replayed `batch_size` at a time, compares in `kinds` (of KINDS); in random order with a shuffle_seed."""
    order = list(entries)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        part = order[start:start + batch_size]
        prompts = [{"prompt_token_ids": e["prompt_token_ids"]} for _, e in part]
        params = [_params(e, "logits" in kinds) for _, e in part]
        try:
            outputs = llm.generate(prompts, params)
        except JaxllmError as e:
            e.where = e.where if e.index is None else f"line {part[e.index][0]}"
            raise
        for (line, e), output in zip(part, outputs, strict=True):
            yield compare(line, e["outputs"], [_bits(o) for o in output.outputs], kinds)


def _params(e: dict, digests: bool = False) -> SamplingParams:
    return SamplingParams(**{**e["sampling"], "seed": e["seed"], "logprobs": e["sampling"].get("logprobs") or 0, "logits_digest": digests})


def compare(line: int, recorded: list[dict], replayed: list[dict], kinds: Sequence[str]) -> Comparison:
    """Two answers to one request, each kind on its own."""
    equal, first = dict.fromkeys(kinds, True), None
    for choice, sides in enumerate(zip(recorded, replayed, strict=True)):
        rows = {kind: list(itertools.zip_longest(*map(KINDS[kind], sides))) for kind in kinds}
        unequal = {kind: next((i for i, (a, b) in enumerate(pairs) if a != b), None) for kind, pairs in rows.items()}
        found = [i for i in unequal.values() if i is not None]
        equal = {kind: equal[kind] and unequal[kind] is None for kind in kinds}
        if found and first is None:
            at = min(found)
            first = Difference(line, choice, at, **{kind: pairs[at] if at < len(pairs) else (None, None) for kind, pairs in rows.items()})
    return Comparison(line, equal, first)
