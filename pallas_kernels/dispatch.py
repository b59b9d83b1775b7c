"""The seam: which implementation of the kernels runs, chosen once, with the reasons kept."""
import dataclasses
from collections.abc import Callable
from functools import partial

from pallas_kernels import reference


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions a model is built from. Frozen and hashable, so that it can be a static argument of jit."""

    name: str
    matmul: Callable       # (x [T, K], w [N, K], bias [N] | None, *, out_dtype) -> [T, N]
    gated_mlp: Callable    # (x [T, D], gate [F, D], up [F, D], activation, *, gate_bias, up_bias) -> [T, F]
    rms_norm: Callable     # (x [..., D], weight [D], eps) -> [..., D]
    attend: Callable       # (q, k, v, k_pages, v_pages, ragged, *, scale, window, softcap) -> (out, k_pages, v_pages)
    log_sum_exp: Callable  # (x [..., V]) -> [...]
    row_sum: Callable      # (x [..., K]) -> [...]
    reasons: tuple[str, ...] = dataclasses.field(default=(), compare=False)


# Differentiable: what a model called as a plain function uses.
REFERENCE = Kernels("reference", reference.matmul, reference.gated_mlp, reference.rms_norm,
                    partial(reference.attend, static_bound=True), reference.log_sum_exp, reference.row_sum)
# The same bits for an engine: loops stop at the longest context, and one row streams the weights.
_stream = partial(reference.matmul, stream_one_row=True)
SERVING = Kernels("reference", _stream, partial(reference.gated_mlp, product=_stream), reference.rms_norm,
                  reference.attend, reference.log_sum_exp, reference.row_sum)


def choose(platform: str, compute_capability, head_dim: int, dtype, page_size: int, want: str = "auto") -> Kernels:
    """The kernels for a device, with the reasons. `want="auto"` falls through; a named choice is strict (ValueError)."""
    if want not in ("auto", "reference"):
        raise ValueError(f"kernels={want!r} is not one of auto, reference")
    return dataclasses.replace(SERVING, reasons=(f"reference: plain XLA on {platform}",))
