"""What the kernels of every card share: where sums are cut, how parts are put together, and activations that fuse one way."""
import math

import jax.numpy as jnp

# On float32 in registers: one product at most in each sum, so that there is one way to fuse. Written out because jax 0.11.2
# lowers no custom_jvp_call into a kernel, and no version lowers erfc.
ACTIVATIONS = {
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def chunk_length(k: int) -> int:
    """K summed by one accumulator before it is added to the others; K alone decides, never the batch.

    Four chunks at most: enough blocks for a card when rows are few (a width of 4096 has 32 column tiles), and few parts,
    which are float32 and are written and read again.
    """
    return max(256, -(-k // 512) * 128)


def added(parts):
    """parts [n, ...] added in ascending order, each addition written out: a sum of XLA's may be in another."""
    total = parts[0]
    for part in range(1, parts.shape[0]):
        total = total + parts[part]
    return total


def merged(state, own, across):
    """The state (top, total, acc) of a context followed by one more split: the one place where splits are put together.

    across(column, like) repeats a column along the rows of acc. The part with the smaller maximum is scaled down and the other
    stays: one product in each sum. Of two a compiler may fuse either with the addition, and the two schedules are two kernels.
    """
    (top, total, acc), (own_top, own_total, own_acc) = state, own
    later = own_top > top
    factor = jnp.exp2(jnp.where(later, top - own_top, own_top - top))
    total = jnp.where(later, own_total, total) + jnp.where(later, total, own_total) * factor
    wide = across(later, acc)
    acc = jnp.where(wide, own_acc, acc) + jnp.where(wide, acc, own_acc) * across(factor, acc)
    return jnp.maximum(top, own_top), total, acc
