"""An affine map, with its weight as published: [out, in]."""
import dataclasses

import jax

from pallas_kernels.dispatch import Kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array       # [out, in]
    bias: jax.Array | None  # [out]


def linear(p: Linear, x: jax.Array, kernels: Kernels, residual: jax.Array | None = None) -> jax.Array:
    """x [T, in] -> [T, out] in x's dtype, added to the residual [T, out] if there is one."""
    return kernels.matmul(x, p.weight, p.bias, residual=residual)
