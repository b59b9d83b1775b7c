r"""Causal attention over pages on Ampere and Ada: decode, ragged prefill and the mixed step, one reduction tree for all.

The tree. The context of a sequence is cut at multiples of SPLIT. A split is one softmax: scores by mma into float32, its
maximum `top`, p = exp2(score - top) rounded to the dtype of v, `total` = p . 1 and `acc` = p . v by mma from zero. The sum
of p is a product with ones because a `sum` in Triton follows the layout of the tile, and that differs between few rows and
many. `tree.merged` puts splits together in ascending order, starting from the empty context. A split that a row does not see
has total 0 and acc 0 and top -1e30, and merging it changes no bit. There are two schedules of that one tree:

    context   |-- split 0 --|-- split 1 --|-- split 2 --|
    in turn   merge(empty, 0)  merge(., 1)   merge(., 2)      one block, state in registers: prefill, many rows
    in runs   write (top, total, acc) of each split, float32   several blocks: few rows with a long context;
              merge(merge(merge(empty, 0), 1), 2)              then `attention_merge` reads them in the same order

Rows of a tile are (token, query head) pairs of one sequence and one kv head: 64 in a prefill, 16 in a decode step. mma
computes 16 of them at a time, whatever the tile, and K in steps of 16. Rows that hold nothing compute on zeros.

Grid and memory. One block for each (kv head, tile[, run of splits]).

    device     q [T, N, H]     k_pages, v_pages [num_pages, page_size, K, H], a pointer for each token, from the block table
                  | masked: what the sequence has not written, or no row of the tile sees, is not read and counts as zero
    shared     k, v [split, H rounded up to a power of two]
    registers  q, score, p rows x split;  acc rows x H, of the split and of what came before;  top and total: float32
    device     out [T, N, H], each row to its place
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels import compat
from pallas_kernels.ragged import Ragged
from pallas_kernels.tree import merged
from pallas_kernels.triton_matmul import SMS, dot

SPLIT = 64      # tokens of context in one split: two stages of k and v at a width of 128 fit the 99 KB of sm_89
MASKED = -1e30  # stands for -inf and keeps `max - max` finite
MOST_PARTS = 256 << 20  # bytes of partial results that a decode step may hold
LOG2E = math.log2(math.e)


def _across(column, like):
    """[rows] repeated along the columns of `like` [rows, columns]."""
    return column[:, None]


def _empty(rows, width):
    """(top [rows], total [rows], acc [rows, width]) of a context of which nothing was seen."""
    return jnp.full((rows,), MASKED, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, width), jnp.float32)


def _normalised(state):
    """acc / total, and zero for a row that saw nothing."""
    _, total, acc = state
    return acc / jnp.where(total == 0.0, 1.0, total)[:, None]


def _tile(meta, tile, rows, group, window):
    """What a tile is about: its sequence, the token [rows] and head [rows] of its kv head that a row holds, whether it holds
    one, its position [rows], and the splits [begin, end) and positions [lowest, last] that any of its rows sees."""
    sequence, start, first_row, end_row, base = (meta[tile, i] for i in range(5))
    row = first_row + jnp.arange(rows)
    last = base + lax.div(jnp.minimum(first_row + rows, end_row) - 1, group)
    lowest = jnp.int32(0) if window is None else jnp.maximum(base + lax.div(first_row, group) - window + 1, 0)
    last = jnp.where(end_row > first_row, last, -1)
    end = lax.div(jnp.maximum(last, -1) + SPLIT, SPLIT)  # 0 where last is -1
    return (sequence, start + lax.div(row, group), lax.rem(row, group), row < end_row, base + lax.div(row, group),
            lax.div(lowest, SPLIT), end, lowest, last)


def _attention_body(q, k_pages, v_pages, table, meta, *outs, rows, wide, run, scale, window, softcap):
    head = pl.program_id(0)
    tile = meta.shape[0] - 1 - pl.program_id(1)  # late tiles see the longest context: start them first
    page_size, kv_heads, width = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    in_bits = scale * LOG2E  # scores in units of log 2: exp2 is one instruction
    sequence, token, group_head, held, position, begin, end, lowest, last = _tile(meta, tile, rows, group, window)
    columns = jnp.arange(wide)
    in_width = (columns < width)[None, :]
    q_at = token[:, None], (head * group + group_head)[:, None], columns[None, :]
    q_mask = held[:, None] & in_width
    q_own = pltriton.load(q.at[q_at], mask=q_mask, other=0.0)
    ones = jnp.ones((16, SPLIT), v_pages.dtype)

    def one_split(i):
        seen = i * SPLIT + jnp.arange(SPLIT)
        written = (seen >= lowest) & (seen <= last)
        page = pltriton.load(table.at[sequence, lax.div(seen, page_size)], mask=written, other=0)
        at = page[:, None], lax.rem(seen, page_size)[:, None], head, columns[None, :]
        mask = written[:, None] & in_width
        score = dot(q_own, pltriton.load(k_pages.at[at], mask=mask, other=0.0)) * in_bits
        if softcap is not None:
            # softcap * tanh(x / softcap), by exp2 as elsewhere
            score = (1.0 - 2.0 / (1.0 + jnp.exp2(score * (2.0 / softcap)))) * (softcap * LOG2E)
        visible = seen[None, :] <= position[:, None]
        if window is not None:
            visible &= seen[None, :] > position[:, None] - window
        score = jnp.where(visible, score, MASKED)
        top = score.max(axis=1)
        # A row that sees nothing of this split has top == MASKED, and exp(MASKED - MASKED) would be one, not zero.
        p = jnp.exp2(score - jnp.where(top == MASKED, 0.0, top)[:, None]).astype(v_pages.dtype)
        v = pltriton.load(v_pages.at[at], mask=mask, other=0.0)
        return top, dot(p, ones).max(axis=1), pltriton.dot(p, v, precision=precision)

    precision = lax.Precision.HIGHEST if v_pages.dtype == jnp.float32 else None
    if run is None:
        out, = outs
        state = lax.fori_loop(begin, end, lambda i, state: merged(state, one_split(i), _across), _empty(rows, wide))
        pltriton.store(out.at[q_at], _normalised(state).astype(out.dtype), mask=q_mask)
        return
    top_out, total_out, acc_out = outs
    first = pl.program_id(2) * run
    row = jnp.arange(rows)

    def step(i, _):
        top, total, acc = one_split(i)
        pltriton.store(acc_out.at[tile, head, i, row[:, None], columns[None, :]], acc, mask=q_mask)
        pltriton.store(top_out.at[tile, head, i, row], top, mask=held)
        pltriton.store(total_out.at[tile, head, i, row], total, mask=held)
    lax.fori_loop(jnp.maximum(begin, first), jnp.minimum(end, first + run), step, None)


def _merge_body(top_parts, total_parts, acc_parts, meta, out, *, rows, wide, group, window):
    head, tile = pl.program_id(0), pl.program_id(1)
    width = out.shape[2]
    _, token, group_head, held, _, begin, end, _, _ = _tile(meta, tile, rows, group, window)
    row, columns = jnp.arange(rows), jnp.arange(wide)
    mask = held[:, None] & (columns < width)[None, :]

    def step(i, state):
        top, total = (pltriton.load(parts.at[tile, head, i, row], mask=held, other=0.0) for parts in (top_parts, total_parts))
        acc = pltriton.load(acc_parts.at[tile, head, i, row[:, None], columns[None, :]], mask=mask, other=0.0)
        return merged(state, (top, total, acc), _across)

    state = lax.fori_loop(begin, end, step, _empty(rows, wide))
    at = token[:, None], (head * group + group_head)[:, None], columns[None, :]
    pltriton.store(out.at[at], _normalised(state).astype(out.dtype), mask=mask)


# A function of its own, so that a program of many layers lowers each distinct kernel once.
@functools.partial(jax.jit, static_argnames=("rows", "run", "scale", "window", "softcap"))
def _launch(q, k_pages, v_pages, table, meta, *, rows, run, scale, window, softcap):
    """Attention of q [T, N, H] in the tiles of `meta` -> the same shape.

    `meta` int32 [n, 5]: row of the table, first token of the sequence in this step, first row of the tile among the
    (token, head) rows of the sequence, how many of those there are, position of the first token (below zero: it sees
    nothing). `run`: splits done by one block, their results merged by a second launch; None: one block does all of a tile.
    """
    n, kv_heads, width = meta.shape[0], k_pages.shape[2], q.shape[2]
    wide = max(16, pl.next_power_of_2(width))
    group = q.shape[1] // kv_heads
    splits = pl.cdiv(table.shape[1] * k_pages.shape[1], SPLIT)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    body = compat.named("attention" if run is None else "attention_splits", _attention_body, rows=rows, wide=wide, run=run,
                        scale=scale, window=window, softcap=softcap)
    params = pltriton.CompilerParams(num_warps=4 if rows * wide <= 64 * 64 and q.dtype != jnp.float32 else 8,
                                     num_stages=2 if wide <= 128 else 1)
    if run is None:
        return pl.pallas_call(body, grid=(kv_heads, n), out_shape=out, compiler_params=params)(q, k_pages, v_pages, table, meta)
    held = min(rows, group)
    stats = jax.ShapeDtypeStruct((n, kv_heads, splits, held), jnp.float32)
    parts = stats, stats, jax.ShapeDtypeStruct((*stats.shape, width), jnp.float32)
    parts = pl.pallas_call(
        body, grid=(kv_heads, n, pl.cdiv(splits, run)), out_shape=parts, compiler_params=params)(q, k_pages, v_pages, table, meta)
    merge = compat.named("attention_merge", _merge_body, rows=rows, wide=wide, group=group, window=window)
    return pl.pallas_call(merge, grid=(kv_heads, n), out_shape=out,
                          compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2))(*parts, meta)


def _wanted_run(tiles: int, kv_heads: int, splits: int, split_bytes: int) -> int | None:
    """Splits for one block, or None for all of a tile's: enough blocks to fill the card. Either way the bits are the same."""
    if splits == 1 or tiles * kv_heads >= 2 * SMS or tiles * kv_heads * splits * split_bytes > MOST_PARTS:
        return None
    return max(1, tiles * kv_heads * splits // (4 * SMS))


def _decode_tiles(ragged, tokens, group, rows):
    """`meta` of a step with one token for each sequence; one without a context sees nothing."""
    each = pl.cdiv(group, rows)
    token = jnp.repeat(jnp.arange(tokens), each)
    base = jnp.where(ragged.kv_len > 0, ragged.positions, -1)
    first_row = jnp.tile(jnp.arange(each) * rows, tokens)
    return jnp.stack([token, token, first_row, jnp.full_like(token, group), base[token]], 1).astype(jnp.int32)


def _prefill_tiles(ragged, tokens, group, rows):
    """`meta` of a ragged step. Tokens past the last sequence are one more sequence, which sees nothing."""
    bounds = jnp.concatenate([ragged.query_start, jnp.full((1,), tokens, ragged.query_start.dtype)])
    start, count = bounds[:-1], jnp.diff(bounds)  # [S + 1]
    sequences = count.shape[0] - 1
    tiles_of = -(-count * group // rows)
    after = jnp.cumsum(tiles_of)
    # sum(ceil(count * group / rows)) for counts that add up to `tokens`
    tile = jnp.arange((tokens * group + min(sequences + 1, tokens) * (rows - 1)) // rows)
    # compare_all: the default searches in a loop, and a loop would cut the step's command buffer in two
    owner = jnp.searchsorted(after, tile, side="right", method="compare_all").clip(0, sequences)
    first_row = (tile - (after - tiles_of)[owner]) * rows  # at or past the end where no tile is left
    base = jnp.where(owner < sequences, ragged.positions[start[owner].clip(0, tokens - 1)], -tokens)
    return jnp.stack([owner.clip(0, sequences - 1), start[owner], first_row, count[owner] * group, base], 1).astype(jnp.int32)


def refusal(head_dim: int, dtype, page_size: int) -> str | None:
    """Why these kernels do not take such a model, or None if they do. Any page size and any group are taken."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name}: triton kernels take bfloat16, float16 and float32"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"head_dim {head_dim}: triton attention takes multiples of 8 up to 256"
    if jnp.dtype(dtype) == jnp.float32 and head_dim > 128:
        return f"head_dim {head_dim} in float32: triton attention takes at most 128, wider keys do not fit the shared memory"
    return None


def _prefill_rows(width, dtype):
    """Rows of a prefill's tile: as many as registers hold without a spill."""
    return 16 if dtype == jnp.float32 else 64 if width <= 128 else 32


def attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, ragged: Ragged, *, scale: float, window: int | None = None,
              softcap: float | None = None, run: int | str | None = "auto") -> jax.Array:
    """Causal attention of q [T, N, H] over the pages of each token's sequence -> [T, N, H] in q's dtype.

    A token sees positions p with own - window < p <= own (window None: all up to its own). The tokens of a sequence in
    one step have consecutive positions. `run` picks the schedule of a decode step and changes no bit.
    """
    tokens, heads, width = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    reason = refusal(width, q.dtype, page_size)
    if reason or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(reason or f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}: "
                         "triton attention takes one dtype")
    group = heads // kv_heads
    if ragged.query_start is None:
        rows = 16
        meta = _decode_tiles(ragged, tokens, group, rows)
        if run == "auto":
            splits = pl.cdiv(ragged.block_tables.shape[1] * page_size, SPLIT)
            run = _wanted_run(meta.shape[0], kv_heads, splits, min(rows, group) * width * 4)
    else:
        rows, run = _prefill_rows(width, q.dtype), None
        meta = _prefill_tiles(ragged, tokens, group, rows)
    return _launch(q, k_pages, v_pages, ragged.block_tables, meta, rows=rows, run=run, scale=scale, window=window, softcap=softcap)


def _write_body(k, v, slots, k_pages, v_pages, k_out, v_out, *, wide):
    token = pl.program_id(0)
    slot, column = slots[token], jnp.arange(wide)
    inside = (slot >= 0) & (slot < k_out.shape[0])
    mask = inside & (column < k.shape[1])
    for rows, out in ((k, k_out), (v, v_out)):
        row = pltriton.load(rows.at[token, column], mask=mask, other=0.0)
        pltriton.store(out.at[jnp.where(inside, slot, 0), column], row, mask=mask)


@jax.jit  # a program of many layers then lowers the kernel once
def write_kv(k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(k_pages, v_pages) [num_pages, page_size, K, H] with k and v [T, K, H] stored at slots int32 [T]; others dropped.

    One block for each token copies K * H numbers twice, in place: both arrays are aliased. Nothing is summed.
    """
    tokens, shape = k.shape[0], k_pages.shape
    flat = [pages.reshape(shape[0] * shape[1], -1) for pages in (k_pages, v_pages)]
    rows = [a.astype(pages.dtype).reshape(tokens, -1) for a, pages in ((k, k_pages), (v, v_pages))]
    body = compat.named("write_kv", _write_body, wide=pl.next_power_of_2(rows[0].shape[1]))
    out = [jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in flat]
    k_pages, v_pages = pl.pallas_call(body, grid=(tokens,), out_shape=out, input_output_aliases={3: 0, 4: 1},
                                      compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1))(*rows, slots, *flat)
    return k_pages.reshape(shape), v_pages.reshape(shape)


def attend(q, k, v, k_pages, v_pages, ragged: Ragged, **options):
    """Attention of q [T, N, H] after k and v [T, K, H] are written to their slots -> (out, k_pages, v_pages)."""
    k_pages, v_pages = write_kv(k_pages, v_pages, k, v, ragged.slots)
    return attention(q, k_pages, v_pages, ragged, **options), k_pages, v_pages
