"""What every paged attention must do, as functions of the attention to be tried: right against float64, and one row's bits
in every kind of step.

Pages that no sequence holds, and the rest of pages that are held in part, are NaN; so is what the interpreters hand out
as fresh memory. A table's unused entries name such a page or none at all.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged import Ragged

# width, group, page_size, window, softcap, dtype
SHAPES = [
    (64, 1, 16, None, None, jnp.float16),
    (128, 4, 32, 50, None, jnp.bfloat16),
    (80, 8, 16, None, 5.0, jnp.bfloat16),
    (256, 3, 64, 70, 5.0, jnp.bfloat16),
]
WIDTHS, PAGE_SIZES, GROUPS = [16, 64, 80, 96, 128, 256], [16, 32, 64], [1, 4, 8]
MASKS = [(None, None), (33, None), (None, 20.0), (33, 20.0)]  # window, softcap


@dataclasses.dataclass
class Case:
    """Sequences whose keys and values are in pages, and the queries of all their tokens."""

    q: np.ndarray        # [sequence][length, N, H]
    k: list              # [sequence][length, K, H]
    v: list
    k_pages: jax.Array
    v_pages: jax.Array
    tables: np.ndarray   # [S, P]
    page_size: int

    def step(self, parts, decode=False, padding=2):
        """(q, ragged) of a step over parts [(sequence, first, last + 1)]; a decode step has one token of each."""
        q = np.concatenate([self.q[s][a:b] for s, a, b in parts] + [np.zeros((padding, *self.q[0].shape[1:]), self.q[0].dtype)])
        position = np.concatenate([np.arange(a, b) for _, a, b in parts] + [np.zeros(padding, int)])
        tables = np.stack([self.tables[s] for s, _, _ in parts] + [self.tables[0]] * (padding if decode else 0))
        length = np.array([b for _, _, b in parts] + [0] * (padding if decode else 0))
        starts = None if decode else jnp.asarray(np.cumsum([0] + [b - a for _, a, b in parts]), jnp.int32)
        slots = jnp.full(len(position), 2 ** 30, jnp.int32)
        return jnp.asarray(q), Ragged(jnp.asarray(position, jnp.int32), slots, jnp.asarray(length, jnp.int32),
                                      jnp.asarray(tables, jnp.int32), starts)


def make(lengths, kv_heads, group, width, page_size, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
    q, k, v = ([draw(n, h, width) for n in lengths] for h in (kv_heads * group, kv_heads, kv_heads))
    pages = [-(-n // page_size) for n in lengths]
    num_pages, longest = sum(pages) + 3, max(pages) + 1
    free = rng.permutation(num_pages)
    nan = np.full((num_pages, page_size, kv_heads, width), np.nan, q[0].dtype)
    k_pages, v_pages = nan.copy(), nan.copy()
    tables = rng.choice([free[-1], -1, num_pages + 5], (len(lengths), longest))
    for s, n in enumerate(lengths):
        tables[s, :pages[s]], free = free[:pages[s]], free[pages[s]:]
        for t in range(n):
            at = tables[s, t // page_size], t % page_size
            k_pages[at], v_pages[at] = k[s][t], v[s][t]
    return Case(q, k, v, jnp.asarray(k_pages), jnp.asarray(v_pages), tables, page_size)


def oracle(case, s, scale, window, softcap):
    """float64 [length, N, H] of sequence s."""
    q, k, v = (np.asarray(a[s]).astype(np.float64) for a in (case.q, case.k, case.v))
    group = q.shape[1] // k.shape[1]
    score = np.einsum("qnh,knh->nqk", q, np.repeat(k, group, 1)) * scale
    if softcap:
        score = np.tanh(score / softcap) * softcap
    own, seen = np.arange(len(q))[:, None], np.arange(len(q))
    mask = (seen <= own) & (seen > own - (window or len(q) + 1))
    p = np.exp(np.where(mask, score, -np.inf) - np.where(mask, score, -np.inf).max(-1, keepdims=True))
    return np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), np.repeat(v, group, 1))


def run(attention, case, step, **options):
    """[T, N, H] of one step."""
    q, ragged = step
    return np.asarray(jax.jit(partial(attention, **options))(q, case.k_pages, case.v_pages, ragged))


def same(a, b):
    """Equal bits, NaN and the sign of zero included."""
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(f"u{a.dtype.itemsize}"), b.view(f"u{b.dtype.itemsize}"))


def ragged_steps_match_float64_and_decode_repeats_their_bits(attention, width, group, page_size, window, softcap, dtype):
    """Lengths around a page and many, continued or begun in one step; then their last tokens alone, in both schedules."""
    lengths = [1, page_size - 1, page_size, page_size + 1, 270]
    case = make(lengths, 2 if width < 256 else 1, group, width, page_size, dtype, seed=width)
    options = dict(scale=width ** -0.5, window=window, softcap=softcap)
    parts = [(s, max(0, n - 20 * s - 1), n) for s, n in enumerate(lengths)]  # the long ones are continued, not begun
    got = run(attention, case, case.step(parts), **options)
    at = 0
    for s, a, b in parts:
        want = oracle(case, s, **options)[a:b]
        # p and the result are rounded to dtype; v is about 1. In float32 what counts is exp2 and 270 terms.
        tolerance = 6 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 1e-5
        np.testing.assert_allclose(got[at:at + b - a].astype(np.float64), want, atol=tolerance)
        at += b - a
    last = np.cumsum([b - a for _, a, b in parts]) - 1
    alone = case.step([(s, b - 1, b) for s, _, b in parts], decode=True)
    for schedule in (None, 1):
        decoded = run(attention, case, alone, **options, run=schedule)
        same(decoded[:len(parts)], got[last])
        assert not decoded[len(parts):].any(), "a padding row sees nothing and is zero"


def a_prompt_in_chunks_in_a_crowd_or_token_by_token_has_the_same_bits(attention, dtype=jnp.bfloat16):
    """One whole prefill against two chunks, the second beside another sequence, and against decode steps."""
    case = make([150, 40], 1, 7, 64, 16, dtype, seed=5)
    options = dict(scale=0.125, window=None, softcap=None)
    whole = run(attention, case, case.step([(0, 0, 150)], padding=0), **options)
    chunks = np.concatenate([run(attention, case, case.step([(0, 0, 37)]), **options)[:37],
                             run(attention, case, case.step([(1, 0, 40), (0, 37, 150)]), **options)[40:153]])
    same(chunks, whole)
    for t in (0, 63, 64, 127, 128, 149):  # around the edges of a split of 64 and of 128
        same(run(attention, case, case.step([(0, t, t + 1)], decode=True, padding=0), **options)[0], whole[t])


def runs_of_any_length_repeat_one_block_that_does_all_splits(attention):
    """A decode step in turn against runs of two and three splits."""
    case = make([400, 129], 1, 2, 64, 16, seed=6)
    options = dict(scale=0.125, window=None, softcap=None)
    step = case.step([(0, 399, 400), (1, 128, 129)], decode=True)
    want = run(attention, case, step, **options, run=None)
    for length in (2, 3):
        same(run(attention, case, step, **options, run=length), want)


def keys_and_values_reach_their_slots_and_nothing_else_changes(write_kv):
    """Slots in order and out of it, below zero and past the end."""
    rng = np.random.default_rng(7)
    pages = jnp.asarray(rng.standard_normal((6, 16, 2, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((13, 2, 64)), jnp.bfloat16) for _ in range(2))
    slots = np.array([5, 90, 96, 1000, -1, -7, 0, 95, 17, 18, 19, 2 ** 31 - 1, 40], np.int32)
    got = write_kv(pages, pages + 1, k, v, jnp.asarray(slots))
    for after, before, rows in zip(got, (pages, pages + 1), (k, v)):
        want = np.asarray(before).reshape(96, 2, 64).copy()
        inside = (slots >= 0) & (slots < 96)
        want[slots[inside]] = np.asarray(rows)[inside]
        same(np.asarray(after).reshape(96, 2, 64), want)


def attend_sees_what_it_wrote(attend, attention):
    """A step into empty pages against the same step over full ones."""
    case = make([33], 2, 2, 64, 16, seed=8)
    q, ragged = case.step([(0, 0, 33)], padding=0)
    table = np.asarray(case.tables[0])
    slots = jnp.asarray([table[t // 16] * 16 + t % 16 for t in range(33)], jnp.int32)
    empty = jnp.full_like(case.k_pages, jnp.nan)
    out, k_pages, v_pages = attend(q, jnp.asarray(case.k[0]), jnp.asarray(case.v[0]), empty, empty,
                                   dataclasses.replace(ragged, slots=slots), scale=0.125)
    same(np.asarray(out), run(attention, case, (q, ragged), scale=0.125, window=None, softcap=None))
    same(np.asarray(k_pages), np.asarray(case.k_pages))
    same(np.asarray(v_pages), np.asarray(case.v_pages))
