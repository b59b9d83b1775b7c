r"""Matrix products on Hopper: x [M, K] . w [N, K], one reduction tree for every M.

The tree. K is cut in chunks of `chunk_length(K)`. A chunk is summed by wgmma m64n128k16 into a float32 accumulator that
starts from zero, K ascending; the chunks' sums are added in ascending order; then the bias. Every M uses the same
instruction on the same 64 rows x 128 columns x 16 of K, so a row's bits depend neither on M, nor on its place, nor on
which of the two schedules ran:

    K      |--- chunk 0 ---|--- chunk 1 ---|--- chunk 2 ---|
    in turn   acc, total=acc  acc, total+=acc acc, total+=acc     one block does a tile's chunks one after another
    split     acc -> part[0]  acc -> part[1]  acc -> part[2]      different blocks; then part[0] + part[1] + part[2]

`split` fills the card when a step has few rows: its partial sums go to device memory in float32, and what comes next adds them:
XLA, which fuses that with what it does anyway and does not reorder additions, or `mosaic_rows.sum_norm`.

Grid and memory. A persistent grid of one block per SM walks a list of (column tile, row tile[, chunk]) items, row tile
fastest so that neighbours share weights in L2. A block has `groups` computing warpgroups, one for each 64 rows, and one
that only starts TMA copies. The column tiles of several weights (`matmuls`) are one list, and each weight has an output:

    device   x [M, K]          w [N, K]
               | TMA             | TMA          rows and K past the end read as zeros
    shared   x_smem[stage]     w_smem[stage]    (64 * groups + 128) x 64 x 2 bytes a stage, `stages` in flight
               \__ wgmma ______/   full[stage]: both copies landed;  free[stage]: every group is done with it
    registers  acc, total      64 x 128 float32 each: 64 + 64 registers a thread
    shared   residual_smem[group]   its tile, if there is one, brought by TMA while the product runs
    shared   out_smem[group]   TMA store, which drops rows and columns past the end
    device   out [M, N]

`gated`: the tile of x . up is computed first and waits in shared memory, in float32, for the tile of x . gate; the
activation is applied to registers and the product is rounded once. It is never split, so that one piece of code
computes the activation for every M.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plmgpu

from pallas_kernels import compat, mosaic_rows, reference
from pallas_kernels.rounding import add, rounded
from pallas_kernels.tree import ACTIVATIONS, added, chunk_length

ROWS = 64       # rows of one wgmma
TILE_N = 128    # columns of one wgmma: m64n128k16, the only shape used
SMS = 132       # of an H100 or H200 (SXM): the persistent grid's width, and no part of the tree
TILE_K = 64     # K of one pipeline stage: 128 bytes, the widest swizzle
EIGHT = 8       # rows of a shared-memory tile: what TMA addresses
STAGES = {1: 6, 2: 5}  # by computing warpgroups: what shared memory holds beside a result of 2 bytes


def _tiled(shape, dtype):
    """A shared-memory type in the tiles that wgmma and TMA exchange: 8 rows of 128 bytes."""
    elements = 128 // jnp.dtype(dtype).itemsize
    return plmgpu.SMEM(shape, dtype, transforms=(plmgpu.TilingTransform((8, elements)), plmgpu.SwizzleTransform(128)))


def _body(x, weights, biases, residual, tiles, *refs, m, widths, k, chunk, groups, stages, split, activation, blocks):
    gated, grouped = activation is not None, tiles is not None
    *outs, x_smem, w_smem, out_smem, up_smem, residual_smem, full, free, landed = refs
    group, block = lax.axis_index("group"), lax.axis_index("block")
    chunks, chunk_steps = pl.cdiv(k, chunk), chunk // TILE_K
    m_tiles = tiles[0, 0] if grouped else pl.cdiv(m, ROWS * groups)
    *before, n_tiles = first_tiles(widths)
    items = m_tiles * n_tiles * (chunks if split else 1)
    mine = lax.div(items - block + blocks - 1, blocks)

    def place(i):
        item = block + i * blocks
        return lax.rem(item, m_tiles), lax.rem(lax.div(item, m_tiles), n_tiles), lax.div(item, m_tiles * n_tiles)

    def first_row(m_tile):
        return tiles[m_tile + 1, 1] * EIGHT if grouped else m_tile * ROWS * groups

    def of_its_weight(n_tile, act):
        """act(which, column tile there) for the weight that a column tile belongs to."""
        for which, first in enumerate(before):
            end = (*before, n_tiles)[which + 1]
            pl.when(True if len(before) == 1 else (n_tile >= first) & (n_tile < end))(functools.partial(act, which, n_tile - first))

    def chunk_range(c):
        return (c, c + 1) if split else (0, chunks)

    def steps_of(c):
        return jnp.minimum(chunk_steps, pl.cdiv(k, TILE_K) - c * chunk_steps)

    def load():
        if groups > 1:
            plmgpu.set_max_registers(40, action="decrease")

        def item_loads(i, count):
            m_tile, n_tile, c = place(i)
            first_chunk, last_chunk = chunk_range(c)
            start = first_chunk * chunk_steps
            steps = jnp.minimum(last_chunk * chunk_steps, pl.cdiv(k, TILE_K)) - start
            first = first_row(m_tile)

            def load_step(w, n_tile, s, count):
                slot = lax.rem(count, stages)

                @pl.when(count >= stages)
                def _():
                    plmgpu.barrier_wait(free.at[slot])
                along_k = pl.ds((start + s) * TILE_K, TILE_K)
                plmgpu.copy_gmem_to_smem(x.at[pl.ds(first, ROWS * groups), along_k], x_smem.at[slot], full.at[slot])
                plmgpu.copy_gmem_to_smem(w.at[pl.ds(n_tile * TILE_N, TILE_N), along_k], w_smem.at[slot], full.at[slot])
                return count + 1

            def load_all(w, n_tile, count):
                w = w.at[tiles[m_tile + 1, 0]] if grouped else w
                lax.fori_loop(0, steps, functools.partial(load_step, w, n_tile), count)

            if gated:
                load_all(weights[1], n_tile, count)
                count += steps
            of_its_weight(n_tile, lambda which, own_tile: load_all(weights[which], own_tile, count))
            return count + steps

        count = lax.fori_loop(0, mine, item_loads, jnp.int32(0))

        def drain(i, _):
            plmgpu.barrier_wait(free.at[lax.rem(i, stages)])
        lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

    def compute():
        if groups > 1:
            plmgpu.set_max_registers(232, action="increase")
        rows = pl.ds(group * ROWS, ROWS)

        def chunk_sum(c, count):
            def accumulate(acc):
                def step(s, _):
                    slot = lax.rem(count + s, stages)
                    plmgpu.barrier_wait(full.at[slot])
                    plmgpu.wgmma(acc, x_smem.at[slot, rows], compat.transposed(w_smem.at[slot]))
                    plmgpu.wgmma_wait(1)

                    @pl.when(s > 0)
                    def _():
                        plmgpu.barrier_arrive(free.at[lax.rem(count + s - 1, stages)])
                lax.fori_loop(0, steps_of(c), step, None)
                return acc[...]
            value = pl.run_scoped(accumulate, plmgpu.ACC((ROWS, TILE_N), jnp.float32))
            count = count + steps_of(c)
            plmgpu.barrier_arrive(free.at[lax.rem(count - 1, stages)])
            return value, count

        def product(c, count):
            if split:
                return chunk_sum(c, count)

            def add(c, carry):
                total, count = carry
                value, count = chunk_sum(c, count)
                return total + value, count
            zero = compat.layout_cast(jnp.zeros((ROWS, TILE_N), jnp.float32), plmgpu.Layout.WGMMA)
            return lax.fori_loop(0, chunks, add, (zero, count))

        def biased_product(which, n_tile, c, count):
            value, count = product(c, count)
            if biases:
                bias = plmgpu.load(biases[which].at[pl.ds(n_tile * TILE_N, TILE_N)], layout=plmgpu.Layout.WGMMA.reduce(0),
                                   optimized=False)
                value = value + lax.broadcast_in_dim(bias.astype(jnp.float32), value.shape, [1])
            return value, count

        def item_products(i, count):
            m_tile, n_tile, c = place(i)
            first, along_n = first_row(m_tile) + group * ROWS, pl.ds(n_tile * TILE_N, TILE_N)
            if residual is not None:
                plmgpu.copy_gmem_to_smem(residual.at[pl.ds(first, ROWS), along_n], residual_smem.at[group], landed.at[group])
            if gated:
                value, count = biased_product(1, n_tile, c, count)
                up_smem[group] = value
            value, count = biased_product(0, n_tile, c, count)
            if gated:
                value = ACTIVATIONS[activation](value) * plmgpu.load(up_smem.at[group], layout=plmgpu.Layout.WGMMA)
            value = value.astype(out_smem.dtype)
            if residual is not None:
                plmgpu.barrier_wait(landed.at[group])
                own = plmgpu.load(residual_smem.at[group], layout=plmgpu.Layout.WGMMA)
                value = (value.astype(jnp.float32) + own.astype(jnp.float32)).astype(out_smem.dtype)
            plmgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[group] = value
            plmgpu.commit_smem()
            # In a tile of a group, eights of rows past its end belong to another tile.
            piece, end = (EIGHT, tiles[m_tile + 1, 2] * EIGHT) if grouped else (ROWS, None)

            def store(which, own_tile):
                target, columns = outs[which].at[c] if split else outs[which], pl.ds(own_tile * TILE_N, TILE_N)
                for start in range(0, ROWS, piece):
                    @pl.when(True if end is None else first + start < end)
                    def _():
                        plmgpu.copy_smem_to_gmem(out_smem.at[group, pl.ds(start, piece)],
                                                 target.at[pl.ds(first + start, piece), columns])
            of_its_weight(n_tile, store)
            return count

        lax.fori_loop(0, mine, item_products, jnp.int32(0))
        plmgpu.wait_smem_to_gmem(0)

    # One branch with two arms: what moves registers from one role to the other wants each role in an arm of its own.
    lax.cond(group < groups, compute, load)


# A function of its own, so that a program of many layers lowers each distinct kernel once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "groups", "stages", "split", "activation", "blocks", "chunk"))
def launch(x, weights, biases, out_dtype, *, groups, stages, split, residual=None, tiles=None, activation=None, blocks=SMS,
           chunk=None):
    """One launch: [M.., N..] (with `split` float32 [chunks, M.., N..]) of x [M, K] with each of the weights [N, K].

    M.. and N.. are at least M and N; the rest is padding. With an activation the weights are a gate and an up of one N, and there
    is one result; biases are one of whole column tiles for all weights, or one for gate and one for up. With `tiles` int32
    [1 + n, 3] the weights are [E, N, K]: in row 0 how many tiles of rows there are, in each other row a tile's expert, its first
    row and where its expert's rows end, by EIGHT. Rows of no tile are not written. A `chunk` that is not `chunk_length(K)` is
    another tree: it is there to be timed.
    """
    x, *weights = (_padded(a) for a in (x, *weights))
    residual = None if residual is None else _padded(residual)
    m, k = x.shape
    gated = activation is not None
    widths = tuple(w.shape[-2] for w in weights)[:1 if gated else None]
    chunk = chunk or chunk_length(k)
    chunks = pl.cdiv(k, chunk)
    out_dtype = jnp.float32 if split else out_dtype
    wide = [n + -n % 64 for n in widths]  # TMA stores tiles of 8 x 128 bytes
    out = [jax.ShapeDtypeStruct((chunks, m, n) if split else (m, n), out_dtype) for n in wide]
    m_tiles = pl.cdiv(m, ROWS * groups) if tiles is None else tiles.shape[0] - 1
    blocks = min(m_tiles * first_tiles(widths)[-1] * (chunks if split else 1), blocks)
    body = functools.partial(_body, m=m, widths=widths, k=k, chunk=chunk, groups=groups, stages=stages, split=split,
                             activation=activation, blocks=blocks)
    body.__name__ = ("" if tiles is None else "grouped_") + ("matmul_split" if split else "gated_mlp" if gated else "matmul")
    return compat.kernel(
        body, out_type=out,
        scratch_types=[
            _tiled((stages, ROWS * groups, TILE_K), x.dtype),
            _tiled((stages, TILE_N, TILE_K), x.dtype),
            _tiled((groups, ROWS, TILE_N), out_dtype),
            _tiled((groups, ROWS, TILE_N), jnp.float32) if gated else None,
            None if residual is None else _tiled((groups, ROWS, TILE_N), out_dtype),
            plmgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plmgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            None if residual is None else plmgpu.Barrier(num_barriers=groups),
        ],
        grid=(blocks,), grid_names=("block",), num_threads=groups + 1, thread_name="group",
    )(x, weights, biases, residual, tiles)


def checked(x, *weights):
    """How many computing warpgroups the rows of x want; ValueError where the kernel cannot take the operands."""
    for w in weights:
        if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
            raise ValueError(f"mosaic matmul of {x.dtype} and {w.dtype}: both must be bfloat16 or both float16")
        if x.shape[1] != w.shape[-1]:
            raise ValueError(f"mosaic matmul of {x.shape} and {w.shape}: K must agree")
    return 1 if x.shape[0] <= ROWS else 2


def _padded(a):
    """a [.., R, K] with zeros up to what TMA takes in tiles of 8 x 64: fewer rows than 8 or whole eights, whole 64s of K.

    Costs a copy where it applies, which is not in models: their widths are multiples of 64, and all but a few
    vocabularies of 8; an engine's buckets of rows are powers of two.
    """
    rows = 0 if a.shape[-2] < EIGHT else -a.shape[-2] % EIGHT
    columns = -a.shape[-1] % TILE_K
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rows), (0, columns)]) if rows or columns else a


def _whole_tiles(bias):
    """[N] padded to whole column tiles: a bias is read without TMA, so nothing may lie past its end."""
    return bias if bias.shape[0] % TILE_N == 0 else jnp.pad(bias, (0, -bias.shape[0] % TILE_N))


def first_tiles(widths) -> list[int]:
    """The column tile at which each of several products begins, and how many tiles they have together."""
    return [sum(pl.cdiv(n, TILE_N) for n in widths[:i]) for i in range(len(widths) + 1)]


def sum_of_parts(parts, rows: int, columns: int, bias, dtype):
    """float32 [chunks, M.., N..] added left to right, then the bias [N] or None -> [rows, columns] in dtype."""
    out = added(parts[:, :rows, :columns])
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return rounded(out, dtype)


def wants_split(m: int, n: int, k: int) -> bool:
    """Whether chunks of K go to different blocks: when the tiles alone leave SMs idle. Either way the bits are the same."""
    groups = 1 if m <= ROWS else 2
    return m <= 2 * ROWS and k > chunk_length(k) and pl.cdiv(m, ROWS * groups) * pl.cdiv(n, TILE_N) < SMS


def matmul(x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, residual: jax.Array | None = None, out_dtype=None,
           split: bool | None = None) -> jax.Array:
    """x [T, K] . w [N, K] + bias [N] -> [T, N] in out_dtype (x's by default); sums and bias in float32.

    With a residual [T, N] of out_dtype: the result is rounded, then added to it as `rounding.add` does. `split` picks the
    schedule and changes no bit. ValueError where the kernel cannot take the operands.
    """
    groups, out_dtype = checked(x, w), jnp.dtype(out_dtype or x.dtype)
    n = w.shape[0]
    if residual is not None and (residual.shape != (x.shape[0], n) or residual.dtype != out_dtype):
        raise ValueError(f"mosaic matmul to {out_dtype} [{x.shape[0]}, {n}]: the residual is {residual.dtype} {list(residual.shape)}")
    if split is None:
        split = wants_split(x.shape[0], n, x.shape[1])
    if out_dtype == jnp.float32 and not split:
        groups = 1  # three warpgroups have 168 registers a thread, and storing float32 spills there
    biases = [] if bias is None or split else [_whole_tiles(bias)]
    out, = launch(x, [w], biases, out_dtype, groups=groups, stages=STAGES[groups], split=split, residual=None if split else residual)
    if not split:
        return out[:x.shape[0], :n]
    out = sum_of_parts(out, x.shape[0], n, bias, out_dtype)
    return out if residual is None else add(residual, out)


def matmuls(x: jax.Array, weights, biases, *, split: bool | None = None) -> tuple[jax.Array, ...]:
    """The products of x [T, K] with several weights [N, K], each with its bias [N] or None -> their [T, N] in x's dtype.

    One launch, in which each product has the bits that `matmul` gives it: it fills the card where one of them alone, the few
    columns of keys and values, would not.
    """
    groups, rows = checked(x, *weights), x.shape[0]
    if split is None:
        split = wants_split(rows, sum(w.shape[0] for w in weights), x.shape[1])
    joined = []
    if not split and any(bias is not None for bias in biases):
        whole = [_whole_tiles(jnp.zeros(w.shape[0], x.dtype) if bias is None else bias) for w, bias in zip(weights, biases, strict=True)]
        joined = [jnp.concatenate(whole)]
    outs = launch(x, list(weights), joined, x.dtype, groups=groups, stages=STAGES[groups], split=split)
    return tuple(sum_of_parts(out, rows, w.shape[0], bias, x.dtype) if split else out[:rows, :w.shape[0]]
                 for out, w, bias in zip(outs, weights, biases, strict=True))


def matmul_norm(x: jax.Array, w: jax.Array, bias: jax.Array | None, *, residual: jax.Array, norm: jax.Array, eps: float,
                split: bool | None = None) -> tuple[jax.Array, jax.Array]:
    """(x [T, K] . w [N, K] + bias added to the residual [T, N], that sum normed with weight norm [N]), in x's dtype.

    The bits are those of `matmul` with the residual and of `mosaic_rows.rms_norm`. Split, one launch after the product does both.
    """
    rows, n = x.shape[0], w.shape[0]
    if split is None:
        split = wants_split(rows, n, x.shape[1])
    if not (split and mosaic_rows.as_it_is(n, x.dtype) and residual.dtype == norm.dtype == x.dtype):
        out = matmul(x, w, bias, residual=residual, split=split)
        return out, mosaic_rows.rms_norm(out, norm, eps)
    groups = checked(x, w)
    parts, = launch(x, [w], [], jnp.float32, groups=groups, stages=STAGES[groups], split=True)
    return mosaic_rows.sum_norm(parts, bias, residual, norm, eps)


def gated_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, activation: str, *, gate_bias=None, up_bias=None) -> jax.Array:
    """activation(x . gate) * (x . up) for x [T, D] and gate, up [F, D] -> [T, F]; rounded to x's dtype once."""
    groups = checked(x, gate, up)
    if activation not in ACTIVATIONS:
        # Neither version lowers erf in a kernel: the two products in float32, the activation in XLA.
        return reference.gated_mlp(x, gate, up, activation, gate_bias=gate_bias, up_bias=up_bias, product=matmul)
    if (gate_bias is None) != (up_bias is None):
        zero = jnp.zeros(gate.shape[0], x.dtype)
        gate_bias, up_bias = (zero if b is None else b for b in (gate_bias, up_bias))
    biases = [] if gate_bias is None else [_whole_tiles(gate_bias), _whole_tiles(up_bias)]
    out, = launch(x, [gate, up], biases, x.dtype, groups=groups, stages=STAGES[groups] - 1, split=False, activation=activation)
    return out[:x.shape[0], :gate.shape[0]]
