"""A plan as arrays: numpy in, padded to one of few shapes, so that few programs are compiled."""
import bisect
import dataclasses

import jax
import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine import keys
from jaxllm.engine.request import Sequence
from jaxllm.engine.sampler import Features, SamplingInputs
from jaxllm.engine.scheduler import Plan, Work
from jaxllm.engine.stop import banned_next
from pallas_kernels.ragged import Ragged

SMALLEST_PREFILL = 16  # tokens; the shapes double from here
FEWEST_EDITS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """The inputs of one forward step. T tokens, S sequences; a decode step has T == S."""

    tokens: jax.Array          # [T] int32
    sources: jax.Array         # [T] int32, row of last_token that holds the token instead; -1: `tokens` does
    ragged: Ragged
    rows: jax.Array | None     # [S] int32, index of each sequence's last token; None: decode, row == token


def decode_buckets(config: EngineConfig) -> list[int]:
    """Row counts that decode steps are padded to: powers of two up to max_num_seqs, and max_num_seqs."""
    return _doubling(1, config.max_num_seqs)


def prefill_buckets(config: EngineConfig) -> list[int]:
    """Token counts that prefill and mixed steps are padded to."""
    return _doubling(min(SMALLEST_PREFILL, config.max_num_batched_tokens), config.max_num_batched_tokens)


def _doubling(first: int, last: int) -> list[int]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return sizes + [last]


def _fit(sizes: list[int], wanted: int) -> int:
    return sizes[bisect.bisect_left(sizes, wanted)]


def padding(t: int, decode: bool, config: EngineConfig) -> Batch:
    """A batch of `t` padding tokens. They write one past the last slot, which the cache drops: slot 0 is live."""
    s = t if decode else min(t, config.max_num_seqs)
    ragged = Ragged(
        positions=np.zeros(t, np.int32), slots=np.full(t, config.cache_pages * config.page_size, np.int32),
        kv_len=np.zeros(s, np.int32), block_tables=np.zeros((s, config.pages_per_seq), np.int32),
        query_start=None if decode else np.zeros(s + 1, np.int32))
    return Batch(np.zeros(t, np.int32), np.full(t, -1, np.int32), ragged, None if decode else np.zeros(s, np.int32))


def build(plan: Plan, config: EngineConfig) -> Batch:
    """The padded arrays of a plan."""
    sizes, wanted = (decode_buckets(config), len(plan.work)) if plan.decode else (prefill_buckets(config), plan.tokens)
    out = padding(_fit(sizes, wanted), plan.decode, config)
    ragged, at = out.ragged, 0
    for i, work in enumerate(plan.work):
        here = slice(at, at + work.count)
        known = work.sequence.tokens[work.start:work.start + work.count]
        out.tokens[at:at + len(known)] = known
        if work.token_pending:
            out.sources[at + work.count - 1] = work.slot
        position = np.arange(work.start, work.start + work.count, dtype=np.int32)
        pages = np.asarray(work.pages, np.int32)
        ragged.positions[here] = position
        ragged.slots[here] = pages[position // config.page_size] * config.page_size + position % config.page_size
        ragged.kv_len[i] = work.start + work.count
        ragged.block_tables[i, :len(pages)] = pages
        at += work.count
        if not plan.decode:
            ragged.query_start[i + 1:] = at
            out.rows[i] = at - 1
    return out


def sampling_inputs(works: tuple[Work, ...], rows: int, vocab: int, config: EngineConfig) -> tuple[SamplingInputs, Features]:
    """What each of `rows` rows of logits is sampled with, for the works that are live and sample, and what they need."""
    live = [(i, w.sequence) for i, w in enumerate(works) if w.samples and w.sequence.finish_reason is None]
    out = SamplingInputs(
        slots=np.full(rows, config.max_num_seqs, np.int32), seeds=np.zeros((rows, 2), np.uint32),
        choices=np.zeros(rows, np.int32), positions=np.zeros(rows, np.int32), temperature=np.zeros(rows, np.float32),
        top_k=np.full(rows, vocab, np.int32), top_p=np.ones(rows, np.float32), min_p=np.zeros(rows, np.float32),
        repetition=np.ones(rows, np.float32), presence=np.zeros(rows, np.float32), frequency=np.zeros(rows, np.float32),
        edit_ids=None, edit_bias=None, edit_count=None, edit_seen=None, mask=None)
    tables, masks, top, random, truncated, digests = {}, {}, None, False, False, False
    for i, sequence in live:
        p = sequence.request.params
        work = works[i]
        out.slots[i] = work.slot
        out.seeds[i] = keys.seed_words(sequence.request.seed)
        out.choices[i], out.positions[i] = sequence.choice, work.start + work.count
        out.temperature[i], out.top_p[i], out.min_p[i] = p.temperature, p.top_p, p.min_p
        out.top_k[i] = min(p.top_k, vocab) or vocab
        out.repetition[i], out.presence[i], out.frequency[i] = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        random |= not p.greedy
        truncated |= bool(p.top_k or p.top_p < 1 or p.min_p > 0)
        digests |= p.logits_digest
        table = edit_table(sequence)
        if table:
            tables[i] = table
        if p.allowed_token_ids is not None:
            masks[i] = p.allowed_token_ids
        if p.logprobs is not None:
            top = max(top or 0, _top_shape(p.logprobs, vocab, config))
    width = 0
    if tables:
        width = FEWEST_EDITS
        while width < max(map(len, tables.values())):
            width *= 4  # each width is a program of its own
        _fill_tables(out, tables, rows, width, vocab)
    if masks:
        out.mask = np.full((rows, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
        for i, allowed in masks.items():
            bits = np.zeros(out.mask.shape[1] * 32, np.uint8)
            bits[list(allowed)] = 1
            out.mask[i] = np.packbits(bits, bitorder="little").view("<u4")
    return out, Features(random, truncated and random, width, bool(masks), top, digests)


def _top_shape(wanted: int, vocab: int, config: EngineConfig) -> int:
    """How many logprobs the program reports: none, max_logprobs or all, so that few programs are compiled."""
    return 0 if wanted == 0 else min(config.max_logprobs, vocab) if wanted > 0 else vocab


def edit_table(sequence: Sequence) -> dict[int, tuple[float, int, bool]]:
    """{token id: (bias, times in the output, stands in prompt or output)} of what a sequence's parameters touch."""
    p = sequence.request.params
    table = {}
    penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1
    if penalised:
        if p.repetition_penalty != 1:
            table = {token: (0.0, 0, True) for token in sequence.request.prompt}
        for token in sequence.tokens[len(sequence.request.prompt):]:
            table[token] = (0.0, table.get(token, (0.0, 0, True))[1] + 1, True)
    for token, bias in p.logit_bias.items():
        table[token] = (bias, *table.get(token, (0.0, 0, False))[1:])
    for token in banned_next(sequence):
        table[token] = (-np.inf, *table.get(token, (0.0, 0, False))[1:])
    return table


def _fill_tables(out: SamplingInputs, tables: dict, rows: int, width: int, vocab: int) -> None:
    out.edit_ids = np.full((rows, width), vocab, np.int32)
    out.edit_bias = np.zeros((rows, width), np.float32)
    out.edit_count = np.zeros((rows, width), np.int32)
    out.edit_seen = np.zeros((rows, width), bool)
    for i, table in tables.items():
        n = len(table)
        out.edit_ids[i, :n] = list(table)
        bias, count, seen = zip(*table.values())
        out.edit_bias[i, :n], out.edit_count[i, :n], out.edit_seen[i, :n] = bias, count, seen
