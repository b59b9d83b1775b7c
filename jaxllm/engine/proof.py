"""The start-up proof: before a compiled program serves, it gives fixed rows the bits that the programs before it gave them.

Subjects are tokens at fixed positions over scratch pages. A program of T rows holds them at its first, last and middle rows, among
strangers; the smallest holds one alone. All programs of one kind must agree on them, bit for bit, through the same compiled code
that serves: whatever changes a bit by the number of rows is found here, also what nobody has listed. What was shown is kept by
`jaxllm.machine.Facts`, so that later processes need not show it again.
"""
import dataclasses
from collections.abc import Callable, Hashable

import numpy as np

from jaxllm.config import SCRATCH_PAGES, EngineConfig
from jaxllm.engine import batch as batches
from jaxllm.engine.batch import Batch
from jaxllm.engine.sampler import Features, SamplingInputs
from jaxllm.machine import Facts

LONGEST = 150  # tokens before the first subject: more than one split of attention
Bits = dict[int, bytes]  # of each subject that a program could hold


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is known of the programs of one kind. Replaced whole, so that an exception leaves none that is half shown."""

    built: tuple = ()       # the programs of this process that agree
    expected: Bits = dataclasses.field(default_factory=dict)
    alone: object = None    # the one program that was built, and compared with none yet


class Proof:
    """What has been shown of the programs of one engine. `kind` is forward, or a draw with its features."""

    def __init__(self, facts: Facts, about: list):
        self._facts, self._about = facts, about
        self._shown: dict[Hashable, Shown] = {}
        self.comparisons = 0

    def differing(self, kind: Hashable, program, run: Callable[[object], Bits]) -> list[int]:
        """The subjects of which `program` has other bits than the programs before it; run(program) -> Bits runs one."""
        shown = self._shown.get(kind, Shown())
        built = (*shown.built, program)
        if program in shown.built:
            return []
        if self._facts.get(self._name(kind, program)) and shown.alone is None:
            self._shown[kind] = dataclasses.replace(shown, built=built)
            return []
        expected = shown.expected or (run(shown.built[0]) if shown.built else {})
        got = run(program)
        shared = [subject for subject in got if subject in expected]
        wrong = [subject for subject in shared if got[subject] != expected[subject]]
        self.comparisons += len(shared)
        if wrong:
            return wrong
        self._shown[kind] = Shown(built, expected | got, None if shared else program)
        for agreeing in {program, shown.alone} - {None} if shared else ():
            self._facts.put(self._name(kind, agreeing), True)
        return []

    def _name(self, kind, program) -> list:
        return ["proof", *self._about, repr(kind), repr(program)]


def subjects(config: EngineConfig, vocab: int) -> list[tuple[int, int]]:
    """[(token, position)]: the longest context first, since the smallest program holds that one alone."""
    positions = sorted({min(p, config.max_model_len - 1) for p in (1, config.page_size + 2, LONGEST)}, reverse=True)
    return [((7 + 131 * i) % vocab, position) for i, position in enumerate(positions[:SCRATCH_PAGES - 1])]


def forward_batch(tokens: int, decode: bool, config: EngineConfig, vocab: int) -> tuple[Batch, dict[int, int]]:
    """A step of `tokens` rows that holds the subjects among strangers, and {subject: its row of the logits}."""
    out = batches.padding(tokens, decode, config)
    ragged, places = out.ragged, len(out.ragged.kv_len)
    rng = np.random.default_rng(tokens)
    known = subjects(config, vocab)[:places]
    first_page = config.num_pages
    ragged.block_tables[:] = first_page
    lengths = [1] * places if decode else _lengths(tokens, len(known), places, config)
    at = dict(zip((places - 1, 0, places // 2), range(len(known)))) if decode else {
        i: i - (len(lengths) > len(known)) for i in range(len(lengths)) if 0 <= i - (len(lengths) > len(known)) < len(known)}
    start = 0
    for i, length in enumerate(lengths):
        here = slice(start, start + length)
        if i in at:
            out.tokens[start], position = known[at[i]]
            page = position // config.page_size
            ragged.block_tables[i, page] = first_page + 1 + at[i]
            ragged.slots[start] = (first_page + 1 + at[i]) * config.page_size + position % config.page_size
            ragged.positions[start] = position
        else:  # a stranger's own keys are dropped: it reads what lies there
            out.tokens[here] = rng.integers(0, vocab, length)
            ragged.positions[here] = np.arange(length) if length > 1 else rng.integers(0, min(config.max_model_len, 2 * LONGEST))
        ragged.kv_len[i] = ragged.positions[here][-1] + 1
        start += length
        if not decode:
            ragged.query_start[i + 1:] = start
            out.rows[i] = start - 1
    return out, {subject: place for place, subject in at.items()}


def _lengths(tokens: int, known: int, places: int, config: EngineConfig) -> list[int]:
    """Tokens of each sequence of a prefill step: a long stranger, the subjects, another stranger, as far as they fit."""
    rest, strangers = tokens - known, min(2, places - known)
    if strangers < 1 or rest < strangers:
        return [1] * known
    before = min(-(-rest // strangers), config.max_model_len)
    after = [min(rest - before, config.max_model_len)] if strangers == 2 and rest > before else []
    return [before] + [1] * known + after


def draw_inputs(rows: int, features: Features, vocab: int, config: EngineConfig) -> tuple[np.ndarray, SamplingInputs, dict[int, int]]:
    """Logits float32 [rows, vocab] and what they are drawn with, and {subject: its row}; no drawn token is kept."""
    rng = np.random.default_rng(vocab)
    base = rng.standard_normal((SCRATCH_PAGES, vocab), np.float32) * 3
    places = dict(zip((rows - 1, 0, rows // 2), range(min(rows, 3))))
    logits = np.stack([base[places[row]] if row in places else np.roll(base[-1], 7 * row + 1) for row in range(rows)])
    inputs, _ = batches.sampling_inputs((), rows, vocab, config)
    who = np.array([places.get(row, 100 + row) for row in range(rows)])
    inputs.seeds[:, 1], inputs.choices[:], inputs.positions[:] = who, who % 3, 20 + who
    if features.random:
        inputs.temperature[:] = 0.7 + 0.1 * (who % 5)
    if features.truncated:
        inputs.top_k[:], inputs.top_p[:], inputs.min_p[:] = np.minimum(vocab, 40 + who), 0.9, 0.001
    if features.edits:
        known = min(features.edits, vocab)
        fill = lambda value, dtype: np.full((rows, features.edits), value, dtype)
        ids = fill(vocab, np.int32)
        ids[:, :known] = np.arange(known)
        inputs = dataclasses.replace(inputs, edit_ids=ids, edit_bias=fill(0.5, np.float32), edit_count=fill(1, np.int32),
                                     edit_seen=fill(True, bool))
        inputs.repetition[:], inputs.presence[:], inputs.frequency[:] = 1.2, 0.3, 0.1
    if features.masked:
        inputs = dataclasses.replace(inputs, mask=np.full((rows, -(-vocab // 32)), 0xF0F0F0F1, np.uint32))
    return logits, inputs, {subject: place for place, subject in places.items()}


def bits_of(tree: list[np.ndarray], places: dict[int, int]) -> Bits:
    """The bytes of the subjects' rows of several arrays [rows, ...]."""
    return {subject: b"".join(np.ascontiguousarray(a[row]).tobytes() for a in tree) for subject, row in places.items()}
