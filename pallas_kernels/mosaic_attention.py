r"""Causal attention over pages on Hopper: decode, ragged prefill and the mixed step, one reduction tree for all.

The tree. The context of a sequence is cut at multiples of `split_length(head_dim)`. A split is one softmax: scores by
wgmma into float32, its maximum `top`, p = exp2(score - top), `total` = the sum of p, `acc` = p . v by wgmma from zero.
`_merged` puts splits together in ascending order, starting from the empty context. A split that a row does not see has
total 0 and acc 0 and top -1e30, and merging it changes no bit. Row and split meet the same instructions on the same
64-row tile whatever else is in the tile, the block, or the step, and there are two schedules of that one tree:

    context   |-- split 0 --|-- split 1 --|-- split 2 --|
    in turn   merge(empty, 0)  merge(., 1)   merge(., 2)      one block, state in registers: prefill, many rows
    in runs   write (top, total, acc) of each split, float32   several blocks: few rows with a long context;
              merge(merge(merge(empty, 0), 1), 2)              then `attention_merge` reads them in the same order

Rows of a tile are (token, query head) pairs of one kv head: 64 / G tokens of one sequence in a prefill, the G heads of one
token in a decode step. Rows that hold nothing compute on zeros and are not stored.

Grid and memory. One block for each (kv head, tile[, run of splits]). Its warpgroups: one or two that compute (two tiles of
64 rows, or two halves of the columns of v when the head is wider than 128), and one that only starts TMA copies.

    device    k_pages, v_pages [num_pages, page_size, K, H], read through the block table, a page a copy
                 | TMA  k_full, v_full [stage]: the pages of a split landed;  k_free, v_free: every group is done
    shared    q [64 * groups, H]   k, v [2 stages, split, H]   p [groups, 64, split]   out [groups, 64, H]
    registers score 64 x split, acc 64 x H (at most 128 columns), top and total 64: float32

p goes through shared memory, in the dtype of v, because the interpreter that proves this file on a CPU wants the left
operand of wgmma there. What a page holds past the end of its sequence is never used: scores there are masked, and v is
cleared before the product, since 0 * NaN is NaN.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plmgpu

from pallas_kernels import compat
from pallas_kernels.mosaic_kv import write_kv
from pallas_kernels.ragged import Ragged

ROWS = 64       # rows of one wgmma
MASKED = -1e30  # stands for -inf and keeps `max - max` finite
MOST_PARTS = 256 << 20  # bytes of partial results that a decode step may hold
LOG2E = math.log2(math.e)
SMS = 132       # of an H100 or H200 (SXM): decides between schedules, no part of the tree

APPROXIMATE = plmgpu.CompilerParams(approx_math=True)  # exp2 in 2 ulp; the precise one spills registers


def split_length(head_dim: int) -> int:
    """Tokens of context in one split; the model alone decides. 64 past a width of 128, so that two stages fit."""
    return 128 if head_dim <= 128 else 64


def _swizzle(row_bytes):
    return next(s for s in (128, 64, 32) if row_bytes % s == 0)


def _tiled(shape, dtype, swizzle=None):
    """A shared-memory type [..., rows, width] in the tiles of wgmma and TMA, under the widest swizzle that divides width."""
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle or _swizzle(shape[-1] * size)
    return plmgpu.SMEM(shape, dtype, transforms=(plmgpu.TilingTransform((8, swizzle // size)), plmgpu.SwizzleTransform(swizzle)))


def _across(column, like):
    """[rows] repeated along the columns of `like` [rows, columns]."""
    return lax.broadcast_in_dim(column, like.shape, [0])


def _empty(width):
    """(top [64], total [64], acc [64, width]) of a context of which nothing was seen."""
    row = plmgpu.Layout.WGMMA.reduce(1)
    return (compat.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), row),
            compat.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
            compat.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plmgpu.Layout.WGMMA))


def _merged(state, own):
    """The state of a context followed by one more split: the one place where splits are put together.

    The part with the smaller maximum is scaled down and the other stays: one product in each sum. Of two a compiler may
    fuse either with the addition, and the two schedules are two kernels.
    """
    (top, total, acc), (own_top, own_total, own_acc) = state, own
    later = own_top > top
    factor = jnp.exp2(jnp.where(later, top - own_top, own_top - top))
    total = jnp.where(later, own_total, total) + jnp.where(later, total, own_total) * factor
    wide = _across(later, acc)
    acc = jnp.where(wide, own_acc, acc) + jnp.where(wide, acc, own_acc) * _across(factor, acc)
    return jnp.maximum(top, own_top), total, acc


def _normalised(state):
    """acc / total, and zero for a row that saw nothing."""
    _, total, acc = state
    return acc / _across(jnp.where(total == 0.0, 1.0, total), acc)


def _attention_body(q, k_pages, v_pages, table, meta, *refs, group_size, heads_first, run, splits, stages, column_groups,
                    scale, window, softcap):
    partial = run is not None
    if partial:
        acc_out, stats_out, q_smem, k_smem, v_smem, p_smem, out_smem, stats_smem, q_full, k_full, v_full, k_free, v_free = refs
    else:
        out, q_smem, k_smem, v_smem, p_smem, out_smem, q_full, k_full, v_full, k_free, v_free = refs
    groups = p_smem.shape[0]
    split, width = k_smem.shape[1:]
    columns = width // column_groups
    page_size = k_pages.shape[1]
    in_bits = scale * LOG2E  # scores in units of log 2: exp2 is one instruction
    pages_per_split = split // page_size
    group, head = lax.axis_index("group"), lax.axis_index("head")
    tile = meta.shape[0] - 1 - lax.axis_index("tile")  # late tiles see the longest context: start them first
    sequence, position, offset, last = (meta[tile, i] for i in range(4))
    begin = jnp.int32(0) if window is None else lax.div(jnp.maximum(position - window + 1, 0), split)
    end = lax.div(last + split, split)  # 0 where last is -1
    if partial:
        this = lax.axis_index("run")
        begin, end = jnp.maximum(begin, this * run), jnp.minimum(end, (this + 1) * run)

    def rows_of(ref, rows):
        return ref.at[tile, head, rows] if heads_first else ref.at[tile, rows, head]

    @pl.when((group == groups) & (end > begin))
    def _load():
        if groups > 1:
            plmgpu.set_max_registers(32, action="decrease")

        def step(i, _):
            count = i - begin
            slot = lax.rem(count, stages)
            last_page = lax.div(last, page_size)
            for pages, smem, full, free in ((k_pages, k_smem, k_full, k_free), (v_pages, v_smem, v_full, v_free)):
                @pl.when(count >= stages)
                def _():
                    plmgpu.barrier_wait(free.at[slot])

                def copy(j, _):
                    # Past the row's end its last page is read again: the table says nothing there.
                    page = table[sequence, jnp.minimum(i * pages_per_split + j, last_page)]
                    plmgpu.copy_gmem_to_smem(pages.at[page, :, head], smem.at[slot, pl.ds(j * page_size, page_size)], full.at[slot])
                lax.fori_loop(0, pages_per_split, copy, None)
        lax.fori_loop(begin, end, step, None)

        def drain(i, _):
            slot = lax.rem(i - begin, stages)
            plmgpu.barrier_wait(k_free.at[slot])
            plmgpu.barrier_wait(v_free.at[slot])
        lax.fori_loop(jnp.maximum(end - stages, begin), end, drain, None)

    @pl.when(group < groups)
    def _compute():
        if groups > 1:
            plmgpu.set_max_registers(240, action="increase")
        row_group, column_group = lax.div(group, column_groups), lax.rem(group, column_groups)
        rows = pl.ds(row_group * ROWS, ROWS)
        along_v = pl.ds(column_group * columns, columns)
        q_own = q_smem.at[row_group]

        @pl.when(column_group == 0)
        def _():
            plmgpu.copy_gmem_to_smem(rows_of(q, rows), q_own, q_full.at[row_group])
        plmgpu.barrier_wait(q_full.at[row_group])

        def one_split(i):
            slot = lax.rem(i - begin, stages)
            plmgpu.barrier_wait(k_full.at[slot])

            def scores(acc):
                plmgpu.wgmma(acc, q_own, compat.transposed(k_smem.at[slot]))
                return acc[...]
            score = pl.run_scoped(scores, plmgpu.ACC((ROWS, split), jnp.float32)) * in_bits
            plmgpu.barrier_arrive(k_free.at[slot])
            if softcap is not None:
                # softcap * tanh(x / softcap), by exp2 because the hardware's own tanh has 11 bits
                score = (1.0 - 2.0 / (1.0 + jnp.exp2(score * (2.0 / softcap)))) * (softcap * LOG2E)
            layout = plmgpu.Layout.WGMMA
            row = plmgpu.broadcasted_iota(jnp.int32, (ROWS, split), 0, layout=layout) + (row_group * ROWS + offset)
            # Positions count from the split's start: what differs by column is then known when the kernel is compiled.
            own_position = lax.div(row, group_size) + (position - i * split)
            seen_position = plmgpu.broadcasted_iota(jnp.int32, (ROWS, split), 1, layout=layout)
            score = jnp.where(seen_position <= own_position, score, MASKED)
            if window is not None:
                score = jnp.where(seen_position > own_position - window, score, MASKED)
            top = score.max(axis=1)
            # A row that sees nothing of this split has top == MASKED, and exp(MASKED - MASKED) would be one, not zero.
            p = jnp.exp2(score - _across(jnp.where(top == MASKED, 0.0, top), score))
            total = p.sum(axis=1)
            p_smem[group] = p.astype(p_smem.dtype)
            plmgpu.barrier_wait(v_full.at[slot])

            @pl.when((i + 1) * split > last + 1)
            def _():
                # What lies past the row's end was never written: 0 * NaN would be NaN.
                def clear(part):
                    tokens = pl.ds(part * ROWS, ROWS)
                    v = plmgpu.load(v_smem.at[slot, tokens, along_v], layout=layout)
                    written = plmgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=layout) <= last - i * split - part * ROWS
                    v_smem[slot, tokens, along_v] = jnp.where(written, v, jnp.zeros_like(v))
                for part in range(split // ROWS):
                    clear(part)
            plmgpu.commit_smem()

            def values(acc):
                plmgpu.wgmma(acc, p_smem.at[group], v_smem.at[slot, :, along_v])
                return acc[...]
            own = pl.run_scoped(values, plmgpu.ACC((ROWS, columns), jnp.float32))
            plmgpu.barrier_arrive(v_free.at[slot])
            return top, total, own

        if partial:
            def step(i, _):
                top, total, acc = one_split(i)
                plmgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stats_smem[group, 0] = top
                stats_smem[group, 1] = total
                piece = out_smem.shape[-1]
                for start in range(0, columns, piece):
                    if start:
                        plmgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[group] = acc[:, start:start + piece]
                    plmgpu.commit_smem()
                    along_piece = pl.ds(column_group * columns + start, piece)
                    plmgpu.copy_smem_to_gmem(out_smem.at[group], acc_out.at[tile, head, i, rows, along_piece])
                # With column groups each writes the same numbers to its own copy.
                plmgpu.copy_smem_to_gmem(stats_smem.at[group], stats_out.at[tile, head, i, group])
            lax.fori_loop(begin, end, step, None)
        else:
            state = lax.fori_loop(begin, end, lambda i, state: _merged(state, one_split(i)), _empty(columns))
            out_smem[group] = _normalised(state).astype(out_smem.dtype)
            plmgpu.commit_smem()
            plmgpu.copy_smem_to_gmem(out_smem.at[group], rows_of(out, rows).at[:, along_v])
        plmgpu.wait_smem_to_gmem(0)


def _merge_body(acc_parts, stats_parts, meta, out, acc_smem, stats_smem, out_smem, full, *, split, stages, column_groups, window):
    tile, head, group = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("group")
    columns = acc_smem.shape[-1]
    row_group, column_group = lax.div(group, column_groups), lax.rem(group, column_groups)
    rows, along_v = pl.ds(row_group * ROWS, ROWS), pl.ds(column_group * columns, columns)
    position, last = meta[tile, 1], meta[tile, 3]
    begin = jnp.int32(0) if window is None else lax.div(jnp.maximum(position - window + 1, 0), split)
    end = lax.div(last + split, split)

    def load(i):
        slot = lax.rem(i - begin, stages)
        plmgpu.copy_gmem_to_smem(acc_parts.at[tile, head, i, rows, along_v], acc_smem.at[group, slot], full.at[group, slot])
        plmgpu.copy_gmem_to_smem(stats_parts.at[tile, head, i, group], stats_smem.at[group, slot], full.at[group, slot])

    for ahead in range(stages):
        @pl.when(begin + ahead < end)
        def _():
            load(begin + ahead)

    def step(i, state):
        slot = lax.rem(i - begin, stages)
        plmgpu.barrier_wait(full.at[group, slot])
        row = plmgpu.Layout.WGMMA.reduce(1)
        own = (plmgpu.load(stats_smem.at[group, slot, 0], layout=row), plmgpu.load(stats_smem.at[group, slot, 1], layout=row),
               plmgpu.load(acc_smem.at[group, slot], layout=plmgpu.Layout.WGMMA))
        state = _merged(state, own)

        @pl.when(i + stages < end)
        def _():
            plmgpu.commit_smem()
            load(i + stages)
        return state

    state = lax.fori_loop(begin, end, step, _empty(columns))
    out_smem[group] = _normalised(state).astype(out_smem.dtype)
    plmgpu.commit_smem()
    plmgpu.copy_smem_to_gmem(out_smem.at[group], out.at[tile, head, rows, along_v])
    plmgpu.wait_smem_to_gmem(0)


# A function of its own, so that a program of many layers lowers each distinct kernel once.
@functools.partial(jax.jit, static_argnames=("group_size", "heads_first", "run", "scale", "window", "softcap"))
def _launch(q, k_pages, v_pages, table, meta, *, group_size, heads_first, run, scale, window, softcap):
    """Attention of q tiles [n, K, R, H] (heads_first) or [n, R, K, H] -> the same shape.

    `meta` int32 [n, 4]: row of the table, position of row 0's token, place of row 0 in its token's group, last position
    that any row sees (-1: none). `run`: splits done by one block, their results merged by a second launch; None: one
    block does all splits of its tile.
    """
    n, width = q.shape[0], q.shape[3]
    kv_heads, rows = (q.shape[1], q.shape[2]) if heads_first else (q.shape[2], q.shape[1])
    split = split_length(width)
    column_groups = 1 if width <= 128 else 2
    groups = pl.cdiv(rows, ROWS) * column_groups
    columns = width // column_groups
    stages = 2
    splits = pl.cdiv(table.shape[1] * k_pages.shape[1], split)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    static = dict(group_size=group_size, heads_first=heads_first, run=run, splits=splits, stages=stages,
                  column_groups=column_groups, scale=scale, window=window, softcap=softcap)
    scratch = [_tiled((groups // column_groups, ROWS, width), q.dtype),
               _tiled((stages, split, width), q.dtype), _tiled((stages, split, width), q.dtype),
               # both operands of a wgmma must be under one swizzle: p takes that of v
               _tiled((groups, ROWS, split), q.dtype, _swizzle(width * q.dtype.itemsize))]
    pages = split // k_pages.shape[1]
    barriers = [plmgpu.Barrier(num_barriers=groups // column_groups), plmgpu.Barrier(num_arrivals=pages, num_barriers=stages),
                plmgpu.Barrier(num_arrivals=pages, num_barriers=stages), plmgpu.Barrier(num_arrivals=groups, num_barriers=stages),
                plmgpu.Barrier(num_arrivals=groups, num_barriers=stages)]
    body = functools.partial(_attention_body, **static)
    if run is None:
        body.__name__ = "attention"
        return compat.kernel(
            body, out_type=out, scratch_types=[*scratch, _tiled((groups, ROWS, columns), q.dtype), *barriers],
            grid=(kv_heads, n), grid_names=("head", "tile"), num_threads=groups + 1, thread_name="group",
            compiler_params=APPROXIMATE,
        )(q, k_pages, v_pages, table, meta)
    body.__name__ = "attention_splits"
    parts = (jax.ShapeDtypeStruct((n, kv_heads, splits, rows, width), jnp.float32),
             jax.ShapeDtypeStruct((n, kv_heads, splits, groups, 2, ROWS), jnp.float32))
    acc_parts, stats_parts = compat.kernel(
        body, out_type=parts,
        scratch_types=[*scratch, _tiled((groups, ROWS, columns // column_groups), jnp.float32), plmgpu.SMEM((groups, 2, ROWS), jnp.float32), *barriers],
        grid=(kv_heads, n, pl.cdiv(splits, run)), grid_names=("head", "tile", "run"), num_threads=groups + 1, thread_name="group",
            compiler_params=APPROXIMATE,
    )(q, k_pages, v_pages, table, meta)
    merge = functools.partial(_merge_body, split=split, stages=stages, column_groups=column_groups, window=window)
    merge.__name__ = "attention_merge"
    return compat.kernel(
        merge, out_type=out,
        scratch_types=[_tiled((groups, stages, ROWS, columns), jnp.float32), plmgpu.SMEM((groups, stages, 2, ROWS), jnp.float32),
                       _tiled((groups, ROWS, columns), q.dtype), plmgpu.Barrier(num_arrivals=2, num_barriers=(groups, stages))],
        grid=(kv_heads, n), grid_names=("head", "tile"), num_threads=groups, thread_name="group",
        compiler_params=APPROXIMATE,
    )(acc_parts, stats_parts, meta)


def _wanted_run(tiles: int, kv_heads: int, splits: int, split_bytes: int) -> int | None:
    """Splits for one block, or None for all of a tile's: enough blocks to fill the card. Either way the bits are the same."""
    if splits == 1 or tiles * kv_heads >= 2 * SMS or tiles * kv_heads * splits * split_bytes > MOST_PARTS:
        return None
    return max(1, tiles * kv_heads * splits // (4 * SMS))


def _decode(q, k_pages, v_pages, ragged, run, **options):
    """One token for each sequence: its query heads of one kv head are the rows of a tile."""
    tokens, heads, width = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    rows = group if group < 8 else group + -group % 8  # what TMA takes: fewer than 8 or whole eights
    tiles = q.reshape(tokens, kv_heads, group, width)
    if rows > group:
        tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    position = jnp.where(ragged.kv_len > 0, ragged.positions, -1)
    meta = jnp.stack([jnp.arange(tokens), jnp.maximum(position, 0), jnp.zeros_like(position), position], 1).astype(jnp.int32)
    if run == "auto":
        splits = pl.cdiv(ragged.block_tables.shape[1] * k_pages.shape[1], split_length(width))
        run = _wanted_run(tokens, kv_heads, splits, rows * width * 4)
    # The division by a tile's row count puts all rows at the token's own position.
    out = _launch(tiles, k_pages, v_pages, ragged.block_tables, meta, group_size=ROWS * pl.cdiv(rows, ROWS), heads_first=True,
                  run=run, **options)
    return out[:, :, :group].reshape(tokens, heads, width)


def _prefill(q, k_pages, v_pages, ragged, rows, **options):
    """Ragged queries: the (token, head) rows of each sequence are dealt into tiles of `rows`, and the results dealt back."""
    tokens, heads, width = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    start, count = ragged.query_start[:-1], jnp.diff(ragged.query_start)  # [S]
    sequences = count.shape[0]
    tiles_of = -(-count * group // rows)
    after = jnp.cumsum(tiles_of)
    # sum(ceil(count * group / rows)) for counts that add up to at most `tokens`
    n = (tokens * group + min(sequences, tokens) * (rows - 1)) // rows
    tile = jnp.arange(n)
    # compare_all: the default searches in a loop, and a loop would cut the step's command buffer in two
    owner = jnp.searchsorted(after, tile, side="right", method="compare_all").clip(0, sequences - 1)
    first_row = (tile - (after - tiles_of)[owner]) * rows  # [n], in its sequence
    row = first_row[:, None] + jnp.arange(rows)
    held = (row < count[owner][:, None] * group) & (tile < after[-1])[:, None]
    by_row = q.reshape(tokens, kv_heads, group, width).swapaxes(1, 2).reshape(tokens * group, kv_heads, width)
    tiles = by_row.at[jnp.where(held, start[owner][:, None] * group + row, tokens * group)].get(mode="fill", fill_value=0)
    token = (start[owner] + first_row // group).clip(0, tokens - 1)
    last_token = (start[owner] + jnp.minimum((first_row + rows - 1) // group, count[owner] - 1)).clip(0, tokens - 1)
    last = jnp.where(held[:, 0], ragged.positions[last_token], -1)
    meta = jnp.stack([owner, ragged.positions[token], first_row % group, last], 1).astype(jnp.int32)
    out = _launch(tiles, k_pages, v_pages, ragged.block_tables, meta, group_size=group, heads_first=False, run=None, **options)
    token = jnp.arange(tokens)
    sequence = jnp.searchsorted(ragged.query_start[1:], token, side="right", method="compare_all").clip(0, sequences - 1)
    place = ((after - tiles_of)[sequence] * rows + (token - start[sequence]) * group)[:, None] + jnp.arange(group)  # [T, G]
    return out.reshape(n * rows, kv_heads, width)[place].swapaxes(1, 2).reshape(tokens, heads, width)


def refusal(head_dim: int, dtype, page_size: int, group: int = 1) -> str | None:
    """Why these kernels do not take such a model, or None if they do."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype).name}: mosaic kernels take bfloat16 and float16"
    if head_dim % 16 or not (16 <= head_dim <= 128 or head_dim == 256):
        return f"head_dim {head_dim}: mosaic attention takes multiples of 16 up to 128, and 256"
    if page_size % 8 or split_length(head_dim) % page_size:
        return f"page_size {page_size}: mosaic attention takes 8, 16, 32 and 64" + (" and 128" if head_dim <= 128 else "")
    if group > 2 * ROWS // (1 if head_dim <= 128 else 2):
        return f"{group} query heads for each kv head: mosaic attention takes at most {2 * ROWS // (1 if head_dim <= 128 else 2)}"
    return None


def _prefill_rows(width, window, softcap):
    """Rows of a prefill's tile: 128, two groups that share the loads of k and v, where registers allow it without a spill."""
    tight = width in (96, 128) and (width == 96 or window is not None) or window is not None and softcap is not None
    return ROWS if width > 128 or tight else 2 * ROWS


def attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, ragged: Ragged, *, scale: float, window: int | None = None,
              softcap: float | None = None, run: int | str | None = "auto") -> jax.Array:
    """Causal attention of q [T, N, H] over the pages of each token's sequence -> [T, N, H] in q's dtype.

    A token sees positions p with own - window < p <= own (window None: all up to its own). The tokens of a sequence in
    one step have consecutive positions. `run` picks the schedule of a decode step and changes no bit.
    """
    reason = refusal(q.shape[2], q.dtype, k_pages.shape[1], q.shape[1] // k_pages.shape[2])
    if reason or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(reason or f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}: mosaic attention takes one dtype")
    options = dict(scale=scale, window=window, softcap=softcap)
    if ragged.query_start is None:
        return _decode(q, k_pages, v_pages, ragged, run, **options)
    return _prefill(q, k_pages, v_pages, ragged, _prefill_rows(q.shape[2], window, softcap), **options)


def attend(q, k, v, k_pages, v_pages, ragged: Ragged, **options):
    """Attention of q [T, N, H] after k and v [T, K, H] are written to their slots -> (out, k_pages, v_pages)."""
    k_pages, v_pages = write_kv(k_pages, v_pages, k, v, ragged.slots)
    return attention(q, k_pages, v_pages, ragged, **options), k_pages, v_pages
