"""An affine map, with its weight as published: [out, in]."""
import dataclasses

import jax

from pallas_kernels.dispatch import Kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array       # [out, in]
    bias: jax.Array | None  # [out]


def linears(several: tuple[Linear, ...], x: jax.Array, kernels: Kernels) -> tuple[jax.Array, ...]:
    """x [T, in] -> [T, out] of each, in x's dtype."""
    return kernels.matmuls(x, [p.weight for p in several], [p.bias for p in several])


def linear_norm(p: Linear, x: jax.Array, kernels: Kernels, *, residual: jax.Array, norm: jax.Array,
                eps: float) -> tuple[jax.Array, jax.Array]:
    """x [T, in] -> [T, out] added to the residual [T, out], and that sum normed with weight `norm` [out]; both in x's dtype."""
    return kernels.matmul_norm(x, p.weight, p.bias, residual=residual, norm=norm, eps=eps)
