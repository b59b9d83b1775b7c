r"""Sums along a row on Ampere and Ada: rms_norm, log_sum_exp, tail_sums, in an order that the row's length alone decides.

The tree. A row is cut in pieces of `_piece(D)` places; the numbers at one place are added over the pieces, ascending; the
places are then summed once, in the one way that Triton has for so many places and warps.

    row    |---- 4096 ----|---- 4096 ----|-- rest 0 --|        what lies past the end counts as zero
    places    p0          +   p1         +   p2                a float32 for each place; then one sum over the places

Grid and memory. One block for each row, from device memory straight to registers. The number of rows is the grid's size
and nothing else, so a row's bits cannot depend on it. `tail_sums` has a block for each row and piece; XLA adds the pieces' sums,
ascending.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels import compat
from pallas_kernels.tree import added


def _piece(width):
    """Places summed side by side: 4096, or the power of two that holds a shorter row."""
    return min(4096, pl.next_power_of_2(width))


def _load(ref, row, start, other=0.0):
    """[piece] as float32 or int32, from `start`, of a row of ref [rows, width], or of ref [width] where row is ()."""
    width = ref.shape[-1]
    piece = _piece(width)
    mask = start + jnp.arange(piece) < width if width % piece else None
    value = pltriton.load(ref.at[(*row, pl.ds(start, piece))], mask=mask, other=None if mask is None else other)
    return value if value.dtype == jnp.int32 else value.astype(jnp.float32)


def _fold(ref, start_value, add, other=0.0):
    """add(value, piece) over the pieces of this block's row, ascending."""
    width = ref.shape[1]
    piece = _piece(width)
    row = (pl.program_id(0),)
    return lax.fori_loop(0, pl.cdiv(width, piece), lambda i, value: add(value, _load(ref, row, i * piece, other)),
                         jnp.full((piece,), start_value, jnp.float32))


def _tail_sums_body(order, *refs):
    *weight, thresholds, out = refs
    row, piece = pl.program_id(0), pl.program_id(1)
    start = piece * _piece(order.shape[1])
    own_order = _load(order, (row,), start, 0)
    if weight:
        own_weight = _load(weight[0], (row,), start)
    else:
        own_weight = (start + jnp.arange(own_order.shape[0]) < order.shape[1]).astype(jnp.int32)
    for i in range(thresholds.shape[1]):
        out[row, piece, i] = jnp.where(own_order >= thresholds[row, i], own_weight, 0).sum()


def _log_sum_exp_body(x, out):
    top = _fold(x, -jnp.inf, jnp.maximum, -jnp.inf).max()
    total = _fold(x, 0.0, lambda total, piece: total + jnp.exp(piece - top), -jnp.inf).sum()
    out[pl.program_id(0)] = top + jnp.log(total)


def _rms_norm_body(x, weight, out, *, eps):
    row, width = pl.program_id(0), x.shape[1]
    piece = _piece(width)
    scale = lax.rsqrt(_fold(x, 0.0, lambda total, piece: total + piece * piece).sum() / width + eps)

    def store(i, _):
        value = _load(x, (row,), i * piece) * scale * _load(weight, (), i * piece)
        mask = i * piece + jnp.arange(piece) < width
        pltriton.store(out.at[row, pl.ds(i * piece, piece)], value.astype(out.dtype), mask=mask)
    lax.fori_loop(0, pl.cdiv(width, piece), store, None)


def _call(body, out, rows, *operands, pieces=()):
    warps = max(1, min(8, _piece(rows.shape[1]) // 256))
    return pl.pallas_call(body, out_shape=out, grid=(rows.shape[0], *pieces),
                          compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1))(rows, *operands)


@jax.jit
def tail_sums(order: jax.Array, weight: jax.Array | None, thresholds: jax.Array) -> jax.Array:
    """For each threshold int32 [S, n] the sum of weight float32 [S, V] where order int32 [S, V] >= threshold -> float32 [S, n].

    Without weights their exact number, int32 [S, n]. Weights are not negative. A sum's order is decided by V alone.
    """
    rows, width = order.shape
    pieces = pl.cdiv(width, _piece(width))
    out = jax.ShapeDtypeStruct((rows, pieces, thresholds.shape[1]), jnp.int32 if weight is None else jnp.float32)
    name = "tail_counts" if weight is None else "tail_sums"
    operands = [a for a in (weight, thresholds) if a is not None]
    return added(_call(compat.named(name, _tail_sums_body), out, order, *operands, pieces=(pieces,)).swapaxes(0, 1))


@jax.jit
def log_sum_exp(x: jax.Array) -> jax.Array:
    """log(sum(exp(x))) over the last axis of float32 x [..., V] -> [...]."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((rows.shape[0],), jnp.float32)
    return _call(compat.named("log_sum_exp", _log_sum_exp_body), out, rows).reshape(x.shape[:-1])


@functools.partial(jax.jit, static_argnames="eps")  # a program of many layers then lowers the kernel once
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] divided by its root mean square and scaled by weight [D], computed in float32, in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    return _call(compat.named("rms_norm", _rms_norm_body, eps=eps), out, rows, weight).reshape(x.shape)
