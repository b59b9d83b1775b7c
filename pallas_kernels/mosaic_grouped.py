r"""Products of a mixture of experts on Hopper: each row with the weights of its expert, on the tree of `mosaic_matmul`.

The tree is that of `matmul`: a row of expert e has the bits of `matmul(row, w[e])`, in the same instructions on the same
64 rows x 128 columns x 16 of K, in turn or split.

Grid and memory. Those of `mosaic_matmul`, with one more table: TMA addresses every eighth row, so one gather in XLA first
moves the rows until each expert's begin at a multiple of 8, and another brings the results back. A tile of rows belongs
to one expert; tiles are listed in device memory, and blocks walk (row tile, column tile[, chunk]), row tile fastest, so
that tiles of one expert share its weights in L2. An expert without rows has no tile, and its weights are not read.

    x by expert   | 0 0 0 | 2 2 2 2 2 2 2 2 2 | 3 |            sizes 3, 0, 9, 1
    in eights     | 0 0 0 - - - - - | 2 2 2 2 2 2 2 2 | 2 - - - - - - - | 3 - - - - - - - |
    tiles         (expert 0, eighths 0 .. 1)  (expert 2, 1 .. 3)  (expert 3, 3 .. 4)
                   a tile reads 64 or 128 rows, its neighbours' too, and stores the eights of its own expert alone
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import reference
from pallas_kernels.mosaic_matmul import EIGHT, ROWS, SMS, STAGES, TILE_N, checked, launch, sum_of_parts
from pallas_kernels.ragged import deal, rows_at, starts_of
from pallas_kernels.tree import ACTIVATIONS, chunk_length


def _grouped(x, weights, group_sizes, out_dtype, *, split=False, activation=None):
    """[T, N] in out_dtype of x [T, K] by expert and one or two weights [E, N, K]."""
    checked(x, *weights)
    tokens, (experts, n, _) = x.shape[0], weights[0].shape
    # As in `matmul`: two computing groups share the loads of the weights where there are rows for them, and registers.
    groups = 2 if tokens > ROWS * experts and (split or out_dtype != jnp.float32) else 1
    starts = starts_of(group_sizes, tokens)
    counts = jnp.diff(starts)
    eights = -(-counts // EIGHT)
    after = jnp.cumsum(eights)
    rows = ROWS * groups
    dealt, by_tile = deal(starts, tokens, EIGHT), deal(starts, tokens, rows)
    own = by_tile.owner
    tiles = jnp.stack([own, (after - eights)[own] + by_tile.first // EIGHT, after[own]], 1)
    tiles = jnp.concatenate([jnp.full((1, 3), (-(-counts // rows)).sum()), tiles]).astype(jnp.int32)
    stages = STAGES[groups] - (activation is not None)
    out, = launch(rows_at(x, dealt.source.reshape(-1)), weights, [], out_dtype, groups=groups, stages=stages, split=split,
                 tiles=tiles, activation=activation)
    if split:
        out = sum_of_parts(out, out.shape[1], n, None, out_dtype)
    return rows_at(out, dealt.place)[:, :n]


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, out_dtype=None, split: bool | None = None) -> jax.Array:
    """Each row of x [T, K] times the weights of its expert, w [E, N, K] -> [T, N] in out_dtype (x's by default).

    Rows come sorted by expert, group_sizes int32 [E] of each; rows past their sum give zeros. `split` picks the schedule
    and changes no bit. ValueError where the kernel cannot take the operands.
    """
    experts, n, k = w.shape
    if split is None:  # when few rows leave SMs idle, as in `matmul`
        tiles = min(x.shape[0], experts) * pl.cdiv(n, TILE_N)
        split = x.shape[0] <= 2 * ROWS and k > chunk_length(k) and tiles < SMS
    return _grouped(x, [w], group_sizes, jnp.dtype(out_dtype or x.dtype), split=split)


def grouped_gated_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, group_sizes: jax.Array, activation: str) -> jax.Array:
    """activation(x . gate) * (x . up) of each row with its expert's gate and up [E, F, D] -> [T, F]; `grouped_matmul` says more."""
    if activation not in ACTIVATIONS:
        return reference.gated_mlp(x, gate, up, activation,
                                   product=lambda x, w, _, out_dtype: grouped_matmul(x, w, group_sizes, out_dtype=out_dtype))
    return _grouped(x, [gate, up], group_sizes, x.dtype, activation=activation)
