r"""Attention by splits on Hopper: the one reduction tree of decode, ragged prefill, the mixed step and encoders.

The tree. The context of a sequence is cut at multiples of `split_length(head_dim)`. A split is one softmax: scores by
wgmma into float32, its maximum `top`, p = exp2(score - top), `total` = the sum of p, `acc` = p . v by wgmma from zero.
`tree.merged` puts splits together in ascending order, starting from the empty context. A split that a row does not see has
total 0 and acc 0 and top -1e30, and merging it changes no bit. Row and split meet the same instructions on the same
64-row tile whatever else is in the tile, the block, or the step, and there are two schedules of that one tree:

    context   |-- split 0 --|-- split 1 --|-- split 2 --|
    in turn   merge(empty, 0)  merge(., 1)   merge(., 2)      one block, state in registers: prefill, many rows, encoders
    in runs   write (top, total, acc) of each split, float32   several blocks: few rows with a long context;
              merge(merge(merge(empty, 0), 1), 2)              then `attention_merge` reads them in the same order

Rows of a tile are (token, query head) pairs of one kv head: 64 / G tokens of one sequence in a prefill, the G heads of one
token in a decode step. Rows that hold nothing compute on zeros and are not stored.

Grid and memory. One block for each (kv head, tile[, run of splits]). Its warpgroups: one or two that compute (two tiles of
64 rows, or two halves of the columns of v when the head is wider than 128), and one that only starts TMA copies.

    device    pages [num_pages, page_size, K, H], causal: read through the block table, a page a copy
              packed [T, K, H], bidirectional: a split a copy, from the sequence's own start
                 | TMA  k_full, v_full [stage]: a split landed;  k_free, v_free: every group is done
    shared    q [64 * groups, H]   k, v [2 stages, split, H]   p [groups, 64, split]   out [groups, 64, H]
    registers score 64 x split, acc 64 x H (at most 128 columns), top and total 64: float32

p goes through shared memory, in the dtype of v, because the interpreter that proves this file on a CPU wants the left
operand of wgmma there. What follows the end of a sequence in its page, or in the packing, is never used: scores there are
masked, and v is cleared before the product, since 0 * NaN is NaN.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plmgpu

from pallas_kernels import compat
from pallas_kernels.tree import merged

ROWS = 64       # rows of one wgmma
MASKED = -1e30  # stands for -inf and keeps `max - max` finite
PACKED = 8      # rows at whose multiples a packed sequence begins: what TMA can address
LOG2E = math.log2(math.e)

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


def _normalised(state):
    """acc / total, and zero for a row that saw nothing."""
    _, total, acc = state
    return acc / _across(jnp.where(total == 0.0, 1.0, total), acc)


def _seen_splits(position, last, split, window, causal):
    """(first, end) of the splits that any row of a tile sees, the tile's first token being at `position`."""
    first = jnp.int32(0) if window is None else lax.div(jnp.maximum(position - window + causal, 0), split)
    return first, lax.div(last + split, split)  # 0 where last is -1


def _attention_body(q, k_in, v_in, table, meta, *refs, group_size, heads_first, run, stages, column_groups, scale, window, softcap):
    partial, causal = run is not None, table is not None
    if partial:
        acc_out, stats_out, q_smem, k_smem, v_smem, p_smem, out_smem, stats_smem, q_full, k_full, v_full, k_free, v_free = refs
    else:
        out, q_smem, k_smem, v_smem, p_smem, out_smem, q_full, k_full, v_full, k_free, v_free = refs
    groups = p_smem.shape[0]
    split, width = k_smem.shape[1:]
    columns = width // column_groups
    in_bits = scale * LOG2E  # scores in units of log 2: exp2 is one instruction
    group, head = lax.axis_index("group"), lax.axis_index("head")
    tile = meta.shape[0] - 1 - lax.axis_index("tile")  # late tiles see the longest context: start them first
    sequence, position, offset, last = (meta[tile, i] for i in range(4))
    begin, end = _seen_splits(position, last, split, window, causal)
    if partial:
        this = lax.axis_index("run")
        begin, end = jnp.maximum(begin, this * run), jnp.minimum(end, (this + 1) * run)

    def rows_of(ref, rows):
        return ref.at[tile, head, rows] if heads_first else ref.at[tile, rows, head]

    def load():
        # Also in a block that has no splits: the computing groups wait until these registers are given up.
        if groups > 1:
            plmgpu.set_max_registers(32, action="decrease")

        def step(i, _):
            count = i - begin
            slot = lax.rem(count, stages)
            for source, smem, full, free in ((k_in, k_smem, k_full, k_free), (v_in, v_smem, v_full, v_free)):
                @pl.when(count >= stages)
                def _():
                    plmgpu.barrier_wait(free.at[slot])

                if not causal:
                    tokens = pl.ds(sequence * PACKED + i * split, split)
                    plmgpu.copy_gmem_to_smem(source.at[tokens, head], smem.at[slot], full.at[slot])
                    continue
                page_size = source.shape[1]

                def copy(j, _):
                    # Past the row's end its last page is read again: the table says nothing there.
                    page = table[sequence, jnp.minimum(i * (split // page_size) + j, lax.div(last, page_size))]
                    plmgpu.copy_gmem_to_smem(source.at[page, :, head], smem.at[slot, pl.ds(j * page_size, page_size)], full.at[slot])
                lax.fori_loop(0, split // page_size, copy, None)
        lax.fori_loop(begin, end, step, None)

        def drain(i, _):
            slot = lax.rem(i - begin, stages)
            plmgpu.barrier_wait(k_free.at[slot])
            plmgpu.barrier_wait(v_free.at[slot])
        lax.fori_loop(jnp.maximum(end - stages, begin), end, drain, None)

    def compute():
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
            slot, rest = lax.rem(i - begin, stages), last - i * split
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
            # Positions count from the split's start: what differs by column is then known when the kernel is compiled.
            seen_position = plmgpu.broadcasted_iota(jnp.int32, (ROWS, split), 1, layout=layout)
            if causal or window is not None:
                # One number a row: of one an element the compiler holds nine a thread, not two, and head_dim 256 spills.
                row = plmgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1)) + (row_group * ROWS + offset)
                own_position = lax.div(row, group_size) + (position - i * split)
            if not causal and window is None:
                visible = seen_position <= rest
            else:
                visible = seen_position <= _across(own_position if causal else jnp.minimum(own_position + window, rest), score)
            if window is not None:
                visible &= seen_position >= _across(own_position - window + causal, score)
            score = jnp.where(visible, score, MASKED)
            top = score.max(axis=1)
            # A row that sees nothing of this split has top == MASKED, and exp(MASKED - MASKED) would be one, not zero.
            p = jnp.exp2(score - _across(jnp.where(top == MASKED, 0.0, top), score))
            total = p.sum(axis=1)
            p_smem[group] = p.astype(p_smem.dtype)
            plmgpu.barrier_wait(v_full.at[slot])

            @pl.when(rest < split - 1)
            def _():
                # What lies past the row's end was never written: 0 * NaN would be NaN.
                def clear(part):
                    tokens = pl.ds(part * ROWS, ROWS)
                    v = plmgpu.load(v_smem.at[slot, tokens, along_v], layout=layout)
                    written = plmgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=layout) <= rest - part * ROWS
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
            state = lax.fori_loop(begin, end, lambda i, state: merged(state, one_split(i), _across), _empty(columns))
            out_smem[group] = _normalised(state).astype(out_smem.dtype)
            plmgpu.commit_smem()
            plmgpu.copy_smem_to_gmem(out_smem.at[group], rows_of(out, rows).at[:, along_v])
        plmgpu.wait_smem_to_gmem(0)

    # One branch with two arms, not two branches: nothing that `compute` needs lives through `load` and its 32 registers.
    lax.cond(group < groups, compute, load)


def _merge_body(acc_parts, stats_parts, meta, out, acc_smem, stats_smem, out_smem, full, *, split, stages, column_groups, window, causal):
    tile, head, group = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("group")
    columns = acc_smem.shape[-1]
    row_group, column_group = lax.div(group, column_groups), lax.rem(group, column_groups)
    rows, along_v = pl.ds(row_group * ROWS, ROWS), pl.ds(column_group * columns, columns)
    begin, end = _seen_splits(meta[tile, 1], meta[tile, 3], split, window, causal)

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
        state = merged(state, own, _across)

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
def launch(q, k, v, table, meta, *, group_size, heads_first, run, scale, window, softcap):
    """Attention of q tiles [n, K, R, H] (heads_first) or [n, R, K, H] -> the same shape.

    With a table int32 [S, P], k and v are pages, and attention is causal. Without one they are packed [T, K, H], and a row
    sees both ways, `window` tokens if there is one. `meta` int32 [n, 4]: row of the table, or the sequence's first row of k
    by PACKED; position of row 0's token, place of row 0 in its token's group, last position that any row sees (-1: none).
    `run`: splits done by one block, their results merged by a second launch; None: one block does all splits of its tile.
    """
    n, width = q.shape[0], q.shape[3]
    kv_heads, rows = (q.shape[1], q.shape[2]) if heads_first else (q.shape[2], q.shape[1])
    split = split_length(width)
    column_groups = 1 if width <= 128 else 2
    groups = pl.cdiv(rows, ROWS) * column_groups
    columns = width // column_groups
    stages = 2
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    static = dict(group_size=group_size, heads_first=heads_first, run=run, stages=stages,
                  column_groups=column_groups, scale=scale, window=window, softcap=softcap)
    scratch = [_tiled((groups // column_groups, ROWS, width), q.dtype),
               _tiled((stages, split, width), q.dtype), _tiled((stages, split, width), q.dtype),
               # both operands of a wgmma must be under one swizzle: p takes that of v
               _tiled((groups, ROWS, split), q.dtype, _swizzle(width * q.dtype.itemsize))]
    copies = 1 if table is None else split // k.shape[1]  # for each split
    barriers = [plmgpu.Barrier(num_barriers=groups // column_groups), plmgpu.Barrier(num_arrivals=copies, num_barriers=stages),
                plmgpu.Barrier(num_arrivals=copies, num_barriers=stages), plmgpu.Barrier(num_arrivals=groups, num_barriers=stages),
                plmgpu.Barrier(num_arrivals=groups, num_barriers=stages)]
    body = functools.partial(_attention_body, **static)
    if run is None:
        body.__name__ = "attention_packed" if table is None else "attention"
        return compat.kernel(
            body, out_type=out, scratch_types=[*scratch, _tiled((groups, ROWS, columns), q.dtype), *barriers],
            grid=(kv_heads, n), grid_names=("head", "tile"), num_threads=groups + 1, thread_name="group",
            compiler_params=APPROXIMATE,
        )(q, k, v, table, meta)
    body.__name__ = "attention_splits"
    splits = pl.cdiv(table.shape[1] * k.shape[1], split)
    parts = (jax.ShapeDtypeStruct((n, kv_heads, splits, rows, width), jnp.float32),
             jax.ShapeDtypeStruct((n, kv_heads, splits, groups, 2, ROWS), jnp.float32))
    acc_parts, stats_parts = compat.kernel(
        body, out_type=parts,
        scratch_types=[*scratch, _tiled((groups, ROWS, columns // column_groups), jnp.float32), plmgpu.SMEM((groups, 2, ROWS), jnp.float32), *barriers],
        grid=(kv_heads, n, pl.cdiv(splits, run)), grid_names=("head", "tile", "run"), num_threads=groups + 1, thread_name="group",
        compiler_params=APPROXIMATE,
    )(q, k, v, table, meta)
    merge = functools.partial(_merge_body, split=split, stages=stages, column_groups=column_groups, window=window, causal=True)
    merge.__name__ = "attention_merge"
    return compat.kernel(
        merge, out_type=out,
        scratch_types=[_tiled((groups, stages, ROWS, columns), jnp.float32), plmgpu.SMEM((groups, stages, 2, ROWS), jnp.float32),
                       _tiled((groups, ROWS, columns), q.dtype), plmgpu.Barrier(num_arrivals=2, num_barriers=(groups, stages))],
        grid=(kv_heads, n), grid_names=("head", "tile"), num_threads=groups, thread_name="group",
        compiler_params=APPROXIMATE,
    )(acc_parts, stats_parts, meta)
