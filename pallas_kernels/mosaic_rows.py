"""Sums along a row on Hopper: rms_norm, alone or after a sum, and log_sum_exp, in an order that the row's length alone decides.

The tree. A row of D numbers is cut in pieces of 4096, the last rest in pieces of 2048, 1024 .. 128. In a piece of n,
each of the 128 lanes of a warpgroup holds the same n / 128 places whatever the row. The pieces' numbers are added into
one number for each of 128 places, ascending; then the 128 places are summed once by `_across_lanes`. All of it in float32.

    row   |------ 4096 ------|------ 4096 ------|- 512 -|128|      D is padded to a multiple of 128 with zeros
             piece 0             piece 1           ...             each summed by the warpgroup, in one fixed way
             total = s0         + s1             + s2   + s3       ascending

Grid and memory. One block of one warpgroup for each row, reading its row from device memory straight to registers; no
shared memory but the few bytes through which warps exchange their sums. The number of rows is the size of the grid and
nothing else, so a row's bits cannot depend on it.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plmgpu

from pallas_kernels import compat

LANES = 128
PIECE = 4096  # 32 numbers a lane: enough loads in flight, few enough registers


def _pieces(length):
    """(start, size) of the pieces of a row past its whole pieces of 4096, down to a rest under 128."""
    start = length // PIECE * PIECE
    size = PIECE // 2
    while length - start >= LANES:
        if length - start >= size:
            yield start, size
            start += size
        else:
            size //= 2


def _load(ref, row, start, size, like=None):
    """float32 [size] of a row, each lane holding the places that it would hold of a row of dtype `like`, its own by default."""
    vector = max(1, min(size // LANES, 16 // jnp.dtype(like or ref.dtype).itemsize))
    layout = plmgpu.Layout.WG_STRIDED((size,), vector)
    return plmgpu.load(ref.at[row, pl.ds(start, size)], layout=layout, optimized=False).astype(jnp.float32)


def _fold(length, load, start_value, add, nothing=0.0):
    """add(value, load(start, size)) over the pieces of a row, ascending; `nothing` stands in a piece for what is not its own."""
    value = lax.fori_loop(0, length // PIECE, lambda i, v: add(v, load(i * PIECE, PIECE)), start_value)
    for start, size in _pieces(length):
        value = add(value, load(start, size))
    if rest := length % LANES:
        place = plmgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=plmgpu.Layout.WG_STRIDED((LANES,), 1))
        value = add(value, jnp.where(place >= LANES - rest, load(length - LANES, LANES), nothing))
    return value


def _log_sum_exp_body(x, out):
    row = lax.axis_index("row")
    fold = functools.partial(_fold, x.shape[1], functools.partial(_load, x, row), nothing=-jnp.inf)
    top = fold(jnp.float32(-jnp.inf), lambda top, piece: jnp.maximum(top, piece.max()))
    total = fold(jnp.float32(0), lambda total, piece: total + jnp.exp(piece - top).sum())
    out[row] = top + jnp.log(total)


def _rms_norm_body(x, weight, out, *, width, eps, load=None):
    """`load` gives the numbers of x as they are read first; what they are scaled and stored from is x."""
    row, length = lax.axis_index("row"), x.shape[1]
    load = load or functools.partial(_load, x, row)
    mean_square = _fold(length, load, jnp.float32(0), lambda total, piece: total + (piece * piece).sum()) / width
    scale = lax.rsqrt(mean_square + eps)

    def store(start, size):
        value = _load(x, row, start, size) * scale * _load(weight, 0, start, size)
        compat.store(out.at[row, pl.ds(start, size)], value.astype(out.dtype))

    lax.fori_loop(0, length // PIECE, lambda i, _: store(i * PIECE, PIECE), None)
    for start, size in _pieces(length):
        store(start, size)
    if length % LANES:
        store(length - LANES, LANES)  # some numbers twice, and the same


def _sum_norm_body(parts, bias, residual, weight, out, normed, *, eps):
    row, dtype = lax.axis_index("row"), out.dtype

    def summed(start, size):
        """A piece of the row as `matmul` gives it: the lane that stores a number reads it again."""
        value, *rest = (_load(parts.at[chunk], row, start, size, dtype) for chunk in range(parts.shape[0]))
        for part in rest:
            value = value + part
        if bias is not None:
            value = value + _load(bias, 0, start, size)
        value = value.astype(dtype).astype(jnp.float32) + _load(residual, row, start, size)
        value = value.astype(dtype)
        compat.store(out.at[row, pl.ds(start, size)], value)
        return value.astype(jnp.float32)

    _rms_norm_body(out, weight, normed, width=out.shape[1], eps=eps, load=summed)


def as_it_is(width: int, dtype) -> bool:
    """Whether rows are read where they lie: not where they are short, or begin where a load of 16 bytes cannot."""
    return width % LANES == 0 or width >= LANES and width * jnp.dtype(dtype).itemsize % 16 == 0


def _padded(x, value=0):
    """x [.., D] as [rows, D], D rounded up to 128 where rows cannot be read where they lie."""
    x = x.reshape(-1, x.shape[-1])
    return x if as_it_is(x.shape[1], x.dtype) else jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)), constant_values=value)


def _call(body, name, out, *operands):
    body.__name__ = name
    return compat.kernel(body, out_type=out, grid=(jax.tree.leaves(out)[0].shape[0],), grid_names=("row",))(*operands)


@jax.jit
def log_sum_exp(x: jax.Array) -> jax.Array:
    """log(sum(exp(x))) over the last axis of float32 x [..., V] -> [...]."""
    rows = _padded(x.astype(jnp.float32), -jnp.inf)
    out = jax.ShapeDtypeStruct((rows.shape[0],), jnp.float32)
    return _call(functools.partial(_log_sum_exp_body), "log_sum_exp", out, rows).reshape(x.shape[:-1])


@functools.partial(jax.jit, static_argnames="eps")  # a program of many layers then lowers the kernel once
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] divided by its root mean square and scaled by weight [D], computed in float32, in x's dtype."""
    width = x.shape[-1]
    rows = _padded(x)
    body = functools.partial(_rms_norm_body, width=width, eps=eps)
    out = _call(body, "rms_norm", jax.ShapeDtypeStruct(rows.shape, x.dtype), rows, _padded(weight))
    return out[:, :width].reshape(x.shape)


@functools.partial(jax.jit, static_argnames="eps")
def sum_norm(parts: jax.Array, bias: jax.Array | None, residual: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(parts float32 [chunks, T.., N..] added in ascending order, with bias [N] or None, rounded and added to the residual
    [T, N]; the same as `rms_norm` with weight [N]), in the residual's dtype. `as_it_is` says which N it takes."""
    out = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    bias = None if bias is None else bias[None]
    return tuple(_call(functools.partial(_sum_norm_body, eps=eps), "sum_norm", (out, out), parts, bias, residual, weight[None]))
