"""Products and sums along a row in plain XLA, each in the order that is fastest for the batch at hand.

What `reproducible=False` runs in place of a reduction tree: bits then depend on the batch. Attention stays the chosen kernels'
own, since nothing faster was found without its tree (docs/cpu-results.md); so does Mosaic's `tail_sums`.
"""
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference
from pallas_kernels.forms import precision
from pallas_kernels.rounding import add

LAST_SUM = partial(jnp.sum, axis=-1)
MOST_FEW_ROWS = 32  # up to here XLA's CPU backend is faster with the weights as the left operand, which it does not pack


def matmul(x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, residual: jax.Array | None = None, out_dtype=None) -> jax.Array:
    """x [T, K] . w [N, K] + bias [N] -> [T, N] in out_dtype (x's by default), plus a residual [T, N] of out_dtype."""
    rows = x.shape[0]
    if rows == 1 and x.dtype != jnp.float32:  # XLA's CPU backend: 10 times slower than two rows
        x = jnp.concatenate([x, x])
    few = 1 < x.shape[0] <= MOST_FEW_ROWS
    out = lax.dot_general(*((w, x) if few else (x, w)), (((1,), (1,)), ((), ())), precision=precision(x.dtype),
                          preferred_element_type=jnp.float32)
    if few:
        out = lax.optimization_barrier(out).T  # without the barrier XLA swaps the operands back
    out = out[:rows]
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    out = out.astype(out_dtype or x.dtype)
    return out if residual is None else add(residual, out)


def tail_sums(order: jax.Array, weight: jax.Array | None, thresholds: jax.Array) -> jax.Array:
    """As `reference.tail_sums`: of weight [S, V], or the number, where order [S, V] >= each of thresholds [S, n] -> [S, n]."""
    return reference.tail_sums(order, weight, thresholds, row_sum=LAST_SUM, count=LAST_SUM)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] divided by its root mean square and scaled by weight [D], computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight.astype(jnp.float32)).astype(x.dtype)


def log_sum_exp(x: jax.Array) -> jax.Array:
    """log(sum(exp(x))) over the last axis of float32 x [..., V] -> [...]."""
    return jax.nn.logsumexp(x, -1)
