"""Sums of a row's tails on Hopper: of the entries at or above each of several thresholds, the row read once for all of them.

The tree. A row of V is cut in pieces of `piece_length(V)`, a power of two up to 4096; the last piece is read with what
stands before it, which counts as zeros. In a piece each of the 128 lanes of a warpgroup holds the same places whatever the
row; entries below the threshold count as zeros, the lanes' numbers are summed in one fixed way, and the pieces' sums are
added in ascending order. No step knows the number of rows, the number of thresholds or a threshold's place among them. Every
addition is of two numbers that are not negative, so a lower threshold never gives less.

    order, weight   |------ piece 0 ------|------ piece 1 ------|-- piece 2 --|       4096 places of each
                                                         |--------------------|       what piece 2 reads
    threshold 0         s00           +       s01           +        s02              float32; int32 for a count
    threshold 1         s10           +       s11           +        s12              ascending

Grid and memory. A block of one warpgroup for each row and piece, so that one row of 128256 keeps 32 SMs busy: it reads its
piece of `order` and `weight` from device memory straight to registers, 64 of them a lane, and writes a number for each
threshold; XLA adds those of the pieces. No shared memory but the few bytes through which warps exchange their sums.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plmgpu

from pallas_kernels import compat
from pallas_kernels.mosaic_rows import LANES, PIECE, _padded
from pallas_kernels.tree import added


def piece_length(width: int) -> int:
    """Places of a row of `width` summed by one block: the power of two up to 4096 that fits, of a padded row at least 128."""
    return min(PIECE, 1 << (width.bit_length() - 1))


def _tail_sums_body(order, *refs, vocab):
    """The sums of one piece of one row; refs: weight where there is one, thresholds, out [S, pieces, n]."""
    *weight, thresholds, out = refs
    row, piece = lax.axis_index("row"), lax.axis_index("piece")
    size = piece_length(order.shape[1])
    start = jnp.minimum(piece * size, order.shape[1] - size)
    layout = plmgpu.Layout.WG_STRIDED((size,), min(size // LANES, 4))  # loads of 16 bytes
    load = lambda ref: plmgpu.load(ref.at[row, pl.ds(start, size)], layout=layout, optimized=False)
    place = start + plmgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
    own = (place >= piece * size) & (place < vocab)  # not of the piece before, not padding
    own_order, own_weight = load(order), jnp.where(own, *((load(weight[0]), 0.0) if weight else (1, 0)))
    at_least = [thresholds[row, i] for i in range(thresholds.shape[1])]  # here, since no load moves up over a sum's barriers
    for i, threshold in enumerate(at_least):
        out[row, piece, i] = jnp.where(own_order >= threshold, own_weight, jnp.zeros((), out.dtype)).sum()


@jax.jit
def tail_sums(order: jax.Array, weight: jax.Array | None, thresholds: jax.Array) -> jax.Array:
    """For each threshold int32 [S, n] the sum of weight float32 [S, V] where order int32 [S, V] >= threshold -> float32 [S, n].

    Without weights their exact number, int32 [S, n]. Weights are not negative. A sum's order is decided by V alone.
    """
    operands = [_padded(a) for a in (order, weight) if a is not None]
    rows, width = operands[0].shape
    pieces = pl.cdiv(width, piece_length(width))
    body = functools.partial(_tail_sums_body, vocab=order.shape[1])
    body.__name__ = "tail_counts" if weight is None else "tail_sums"
    out = jax.ShapeDtypeStruct((rows, pieces, thresholds.shape[1]), jnp.int32 if weight is None else jnp.float32)
    parts = compat.kernel(body, out_type=out, grid=(rows, pieces), grid_names=("row", "piece"))(*operands, thresholds)
    return added(parts.swapaxes(0, 1))
