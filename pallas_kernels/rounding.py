"""Rounding that happens where it is written."""
import jax
import jax.numpy as jnp
from jax import lax


def rounded(x: jax.Array, dtype) -> jax.Array:
    """float32 x in `dtype`. XLA may skip a cast to bfloat16 and back between operations that it fuses, and whether it fuses
    them depends on the program; a `reduce_precision` it keeps."""
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(dtype)
    if dtype == jnp.float16:  # reduce_precision would flush its subnormals
        return lax.optimization_barrier(x.astype(dtype))
    return x.astype(dtype)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y of float32, rounded before it is added to another product.

    Of two products in a sum a compiler may fuse either with the addition, and chooses by shape. A maximum with the lowest
    number changes nothing but -inf, no compiler removes it, and unlike a barrier it costs no pass of its own.
    """
    return jnp.maximum(x * y, jnp.finfo(jnp.float32).min)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, summed in float32 and rounded to their dtype."""
    return rounded(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)
