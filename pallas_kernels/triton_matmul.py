r"""Matrix products on Ampere and Ada: x [M, K] . w [N, K], one reduction tree for every M.

The tree. K is cut in chunks of `chunk_length(K)`. A chunk is summed by mma.m16n8k16 into a float32 accumulator that starts
from zero, K ascending in steps of 64; the chunks' sums are added in ascending order; then the bias. Tiles differ in rows
and columns with M, but along K every tile does the same instructions in the same order, and Triton never deals the K of
one tile to several warps. float32 operands are summed by fused multiply-adds, K ascending, in the same chunks.

    K      |--- chunk 0 ---|--- chunk 1 ---|--- chunk 2 ---|
    in turn   acc, total=acc  acc, total+=acc acc, total+=acc     one block does a tile's chunks one after another
    split     acc -> part[0]  acc -> part[1]  acc -> part[2]      different blocks; then part[0] + part[1] + part[2]

Grid and memory. One block for each (row tile, column tile[, chunk]), row tile fastest so that neighbours share weights in L2.

    device     x [M, K], w [N, K]     rows, columns and K past the end are masked: they read as zeros
                  | cp.async, `stages` steps in flight
    shared     x rows x 64, w columns x 64
                  | ldmatrix, mma
    registers  acc, total: float32 rows x columns each; gated: one pair for gate and one for up
    device     out [M, N]             rows and columns past the end are not stored

A chunk has at least two steps, since Triton turns `total + dot(a, b)` into a product that accumulates on `total`, which is
another order; of a sum that went through a loop it cannot do that.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels import compat, reference
from pallas_kernels.rounding import add, rounded
from pallas_kernels.tree import ACTIVATIONS, added, chunk_length

SMS = 108  # of an A100: decides between schedules, no part of the tree

def step_length(dtype) -> int:
    """K of one step: 128 bytes of a row."""
    return 128 // jnp.dtype(dtype).itemsize


def _tile(m, dtype, gated):
    """(rows, columns, warps, stages) of a tile: registers and 99 KB of shared memory decide, and none is part of the tree."""
    if dtype == jnp.float32:
        return (16, 32, 4, 2) if m <= 16 else (64, 32, 8, 2)
    if m <= 16:
        return 16, 64, 4, 4
    if m <= 64:
        return 64, 64, 4, 3
    return (128, 64, 8, 3) if gated else (128, 128, 8, 3)


def dot(a, b):
    """float32 a [M, K] . b [N, K]; operands in float32 are not rounded to TF32."""
    return pltriton.dot(a, b, trans_b=True, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _body(*refs, rows, columns, split, gated, activation, biased):
    inputs = 2 + gated + biased * (1 + gated)
    x, *weights = refs[:2 + gated]
    biases, out = refs[2 + gated:inputs], refs[inputs]
    (m, k), n = x.shape, weights[0].shape[0]
    step_k, chunk = step_length(x.dtype), chunk_length(k)
    chunks, chunk_steps, all_steps = pl.cdiv(k, chunk), chunk // step_k, pl.cdiv(k, step_k)
    m_tiles = pl.cdiv(m, rows)
    first_row = lax.rem(pl.program_id(0), m_tiles) * rows
    first_column = lax.div(pl.program_id(0), m_tiles) * columns

    def inside(first, size, end):
        return first + jnp.arange(size) < end

    def load(ref, first, size, first_k):
        mask = None
        if ref.shape[0] % size:
            mask = inside(first, size, ref.shape[0])[:, None]
        if k % step_k:
            along_k = inside(first_k, step_k, k)[None, :]
            mask = along_k if mask is None else mask & along_k
        if mask is not None:
            mask = jnp.broadcast_to(mask, (size, step_k))
        block = ref.at[pl.ds(first, size), pl.ds(first_k, step_k)]
        return pltriton.load(block, mask=mask, other=None if mask is None else 0.0)

    zero = tuple(jnp.zeros((rows, columns), jnp.float32) for _ in weights)

    def chunk_sum(c):
        def step(s, acc):
            first_k = (c * chunk_steps + s) * step_k
            a = load(x, first_row, rows, first_k)
            return tuple(part + dot(a, load(w, first_column, columns, first_k)) for part, w in zip(acc, weights))
        steps = chunk_steps if k % chunk == 0 else jnp.minimum(chunk_steps, all_steps - c * chunk_steps)
        return lax.fori_loop(0, steps, step, zero)

    if split:
        value, = chunk_sum(pl.program_id(1))
    else:
        values = lax.fori_loop(0, chunks, lambda c, total: tuple(t + part for t, part in zip(total, chunk_sum(c))), zero)
        if biased:
            mask = inside(first_column, columns, n)
            values = [value + pltriton.load(b.at[pl.ds(first_column, columns)], mask=mask, other=0.0).astype(jnp.float32)[None, :]
                      for value, b in zip(values, biases)]
        value = ACTIVATIONS[activation](values[0]) * values[1] if gated else values[0]
    target = (pl.ds(first_row, rows), pl.ds(first_column, columns))
    mask = inside(first_row, rows, m)[:, None] & inside(first_column, columns, n)[None, :]
    pltriton.store(out.at[(pl.program_id(1), *target)] if split else out.at[target], value.astype(out.dtype), mask=mask)


# A function of its own, so that a program of many layers lowers each distinct kernel once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "split", "activation"))
def _call(x, weights, biases, out_dtype, *, split, activation=None):
    """One launch: out [M, N] (with `split` float32 [chunks, M, N]) of x [M, K] and one or two weights [N, K]."""
    (m, k), n = x.shape, weights[0].shape[0]
    gated = len(weights) == 2
    rows, columns, warps, stages = _tile(m, x.dtype, gated)
    chunks = pl.cdiv(k, chunk_length(k)) if split else 1
    name = "matmul_split" if split else "gated_mlp" if gated else "matmul"
    body = compat.named(name, _body, rows=rows, columns=columns, split=split, gated=gated, activation=activation, biased=bool(biases))
    return pl.pallas_call(
        body, grid=(pl.cdiv(m, rows) * pl.cdiv(n, columns), chunks),
        out_shape=jax.ShapeDtypeStruct((chunks, m, n), jnp.float32) if split else jax.ShapeDtypeStruct((m, n), out_dtype),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
    )(x, *weights, *biases)


def _check(x, *weights):
    for w in weights:
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or w.dtype != x.dtype:
            raise ValueError(f"triton matmul of {x.dtype} and {w.dtype}: both must be bfloat16, float16 or float32")
        if x.shape[1] != w.shape[1]:
            raise ValueError(f"triton matmul of {x.shape} and {w.shape}: K must agree")


def wants_split(m: int, n: int, k: int) -> bool:
    """Whether chunks of K go to different blocks: when the tiles alone leave SMs idle. Either way the bits are the same."""
    return m <= 64 and k > chunk_length(k) and pl.cdiv(m, 64) * pl.cdiv(n, 64) < 2 * SMS


def matmul(x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, residual: jax.Array | None = None, out_dtype=None,
           split: bool | None = None) -> jax.Array:
    """x [T, K] . w [N, K] + bias [N] -> [T, N] in out_dtype (x's by default); sums and bias in float32.

    With a residual [T, N] of out_dtype: the result is rounded, then added to it as `rounding.add` does, by XLA.
    """
    out = _matmul(x, w, bias, out_dtype, split)
    return out if residual is None else add(residual, out)


def _matmul(x, w, bias, out_dtype, split):
    _check(x, w)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if split is None:
        split = wants_split(x.shape[0], *w.shape)
    if not split:
        return _call(x, [w], [] if bias is None else [bias], out_dtype, split=False)
    out = added(_call(x, [w], [], jnp.float32, split=True))
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return rounded(out, out_dtype)


def gated_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, activation: str, *, gate_bias=None, up_bias=None) -> jax.Array:
    """activation(x . gate) * (x . up) for x [T, D] and gate, up [F, D] -> [T, F]; rounded to x's dtype once."""
    _check(x, gate, up)
    if activation not in ACTIVATIONS:
        # Triton under Pallas lowers no erf: the two products in float32, the activation in XLA.
        return reference.gated_mlp(x, gate, up, activation, gate_bias=gate_bias, up_bias=up_bias, product=matmul)
    if (gate_bias is None) != (up_bias is None):
        zero = jnp.zeros(gate.shape[0], x.dtype)
        gate_bias, up_bias = (zero if b is None else b for b in (gate_bias, up_bias))
    return _call(x, [gate, up], [] if gate_bias is None else [gate_bias, up_bias], x.dtype, split=False, activation=activation)
