"""The seam: which implementation of the kernels runs, chosen once, with the reasons kept."""
import dataclasses
from collections.abc import Callable
from functools import cache, partial

from pallas_kernels import reference
from pallas_kernels.forms import Forms

# A kernel that reads a row once for 15 thresholds: some 45 instructions for the 8 bytes of an entry, about what an H200 does
# while it loads them.
WAYS = 16


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions a model is built from. Frozen and hashable, so that it can be a static argument of jit."""

    name: str
    matmul: Callable       # (x [T, K], w [N, K], bias [N] | None, *, residual [T, N] | None, out_dtype) -> [T, N]
    gated_mlp: Callable    # (x [T, D], gate [F, D], up [F, D], activation, *, gate_bias, up_bias) -> [T, F]
    rms_norm: Callable     # (x [..., D], weight [D], eps) -> [..., D]
    attend: Callable       # (q, k, v, k_pages, v_pages, ragged, *, scale, window, softcap) -> (out, k_pages, v_pages)
    log_sum_exp: Callable  # (x [..., V]) -> [...]
    tail_sums: Callable    # (order int32 [S, V], weight float32 [S, V] | None, thresholds int32 [S, n]) -> [S, n]
    search_ways: int       # n + 1 of a search by tail_sums: 2, 4 or 16, the fastest; the result is the same for all
    attend_bidirectional: Callable  # (q [T, N, H], k, v [T, K, H], starts [S + 1], *, scale, window, softcap) -> [T, N, H]
    grouped_matmul: Callable     # (x [T, K], w [E, N, K], group_sizes [E], *, out_dtype) -> [T, N]
    grouped_gated_mlp: Callable  # (x [T, D], gate [E, F, D], up [E, F, D], group_sizes [E], activation) -> [T, F]
    # One launch for what the methods below compose, and the same bits; None where an implementation has none.
    fused_matmuls: Callable | None = None      # (x [T, K], weights [N, K], biases [N] | None) -> [T, N] of each
    fused_matmul_norm: Callable | None = None  # (x, w, bias | None, *, residual [T, N], norm [N], eps) -> ([T, N], [T, N])
    forms: Forms = reference.ASSUMED  # of the reference's products
    reasons: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def compiler_options(self) -> dict:
        """What a program of these kernels must be compiled with, or its sums have another order."""
        return self.forms.compiler_options

    @property
    def sums(self) -> str:
        """The order of a product's sums, in words: what a machine was found to have, or what the kernels fix."""
        if self.name != "reference":
            return "by the batch" if self.name.endswith("fast") else "chunks of K in ascending order"
        law = self.forms.law
        values = ", values over the last axis" if self.forms.values_last else ""
        return f"{law}, attention of {self.forms.attention_rows} rows{values}" + ("" if self.forms.proven else ", assumed")

    def safer(self, rows: int) -> "Kernels | None":
        """The same bits for a step of so many rows by products that ask less of XLA's library; None if there are none."""
        forms = self.forms.safer(rows)
        return None if forms is None else dataclasses.replace(reference_kernels(forms, False), reasons=self.reasons)

    def matmuls(self, x, weights, biases):
        """The products of x [T, K] with several weights [N, K], each with its bias [N] or None -> their [T, N], in x's dtype."""
        if self.fused_matmuls is not None:
            return self.fused_matmuls(x, weights, biases)
        return tuple(self.matmul(x, w, bias) for w, bias in zip(weights, biases, strict=True))

    def matmul_norm(self, x, w, bias, *, residual, norm, eps):
        """(x [T, K] . w [N, K] + bias added to the residual [T, N], the same as `rms_norm` with weight norm [N]), in x's dtype."""
        if self.fused_matmul_norm is not None:
            return self.fused_matmul_norm(x, w, bias, residual=residual, norm=norm, eps=eps)
        out = self.matmul(x, w, bias, residual=residual)
        return out, self.rms_norm(out, norm, eps)


@cache
def reference_kernels(forms: Forms, static_bound: bool) -> Kernels:
    """The kernels in XLA, products in these forms. static_bound: loops run over all pages, which makes them differentiable; the
    bits are the same. One object for equal forms, since jit tells partials apart by identity."""
    product = partial(reference.matmul, product=forms.product)
    attention = {"static_bound": static_bound, "forms": forms}
    return Kernels("reference", product, partial(reference.gated_mlp, product=product), reference.rms_norm,
                   partial(reference.attend, **attention), reference.log_sum_exp, reference.tail_sums, 2,
                   partial(reference.attend_bidirectional, **attention), reference.grouped_matmul, reference.grouped_gated_mlp, forms=forms)


# Nothing probed. Differentiable: what a model called as a plain function uses; and the same bits for an engine.
REFERENCE, SERVING = reference_kernels(reference.ASSUMED, True), reference_kernels(reference.ASSUMED, False)


@cache
def _mosaic() -> Kernels:
    """Hopper. Imported when chosen: a CPU never needs it."""
    from pallas_kernels import mosaic_attention, mosaic_grouped, mosaic_matmul, mosaic_rows, mosaic_tail
    return Kernels("mosaic", mosaic_matmul.matmul, mosaic_matmul.gated_mlp, mosaic_rows.rms_norm, mosaic_attention.attend,
                   mosaic_rows.log_sum_exp, mosaic_tail.tail_sums, WAYS, mosaic_attention.attend_bidirectional,
                   mosaic_grouped.grouped_matmul, mosaic_grouped.grouped_gated_mlp,
                   fused_matmuls=mosaic_matmul.matmuls, fused_matmul_norm=mosaic_matmul.matmul_norm)


@cache
def _triton() -> Kernels:
    """Ampere and Ada. Imported when chosen, and named nowhere else: jax will drop its Triton backend."""
    from pallas_kernels import triton_attention, triton_matmul, triton_rows
    return Kernels("triton", triton_matmul.matmul, triton_matmul.gated_mlp, triton_rows.rms_norm, triton_attention.attend,
                   triton_rows.log_sum_exp, triton_rows.tail_sums, WAYS,
                   reference.attend_bidirectional, reference.grouped_matmul, reference.grouped_gated_mlp)


def _capability(value) -> tuple[int, int] | None:
    """(major, minor) of "9.0", 9.0 or (9, 0)."""
    if value is None:
        return None
    major, _, minor = (".".join(map(str, value)) if isinstance(value, tuple) else str(value)).partition(".")
    return int(major), int(minor or 0)


def _why_not_mosaic(platform, compute_capability, head_dim, dtype, page_size) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"mosaic: needs an NVIDIA GPU, the platform is {platform}"
    if _capability(compute_capability) != (9, 0):
        return f"mosaic: written for compute capability 9.0 (H100, H200), the device has {compute_capability}"
    from pallas_kernels import mosaic_attention
    reason = mosaic_attention.refusal(head_dim, dtype, page_size)
    return None if reason is None else f"mosaic: {reason}"


def _why_not_triton(platform, compute_capability, head_dim, dtype, page_size) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"triton: needs an NVIDIA GPU, the platform is {platform}"
    major = (_capability(compute_capability) or (0, 0))[0]
    if major != 8:
        why = "; on 9.0 Triton would compute 16 rows by mma and 64 by wgmma, two orders of a sum" if major == 9 else ""
        return f"triton: written for compute capability 8.0 to 8.9 (Ampere, Ada), the device has {compute_capability}{why}"
    from pallas_kernels import compat
    reason = compat.no_triton()
    if reason is None:
        from pallas_kernels import triton_attention
        reason = triton_attention.refusal(head_dim, dtype, page_size)
    return None if reason is None else f"triton: {reason}"


def _fast(kernels: Kernels) -> Kernels:
    """The same attention, and XLA's own products and sums along a row."""
    from pallas_kernels import fast
    return dataclasses.replace(
        kernels, name=f"{kernels.name}+fast", matmul=fast.matmul, gated_mlp=partial(reference.gated_mlp, product=fast.matmul),
        rms_norm=fast.rms_norm, log_sum_exp=fast.log_sum_exp, fused_matmuls=None, fused_matmul_norm=None,
        # a kernel that weighs many thresholds in one pass stays
        tail_sums=fast.tail_sums if kernels.search_ways == 2 else kernels.tail_sums,
        reasons=kernels.reasons + ("fast: not reproducible, as asked; bits depend on the batch",))


def choose(platform: str, compute_capability, head_dim: int, dtype, page_size: int, want: str = "auto",
           reproducible: bool = True, forms: Forms = reference.ASSUMED) -> Kernels:
    """The kernels for a device and a model, with the reasons in `.reasons`.

    A named choice is strict: ValueError says why it cannot be had. "auto" takes mosaic on Hopper and triton on Ampere and Ada
    where they run, else the reference with its products in `forms`, and keeps the reasons. With `reproducible` False, products and sums along a row are
    XLA's, whose bits depend on the batch.
    """
    chosen = _choose(platform, compute_capability, head_dim, dtype, page_size, want, forms)
    return chosen if reproducible else _fast(chosen)


def _choose(platform, compute_capability, head_dim, dtype, page_size, want, forms) -> Kernels:
    dtype = getattr(dtype, "dtype", dtype)
    if want not in ("auto", "mosaic", "triton", "reference"):
        raise ValueError(f"kernels {want!r}: allowed are auto, mosaic, triton and reference")
    if want == "reference":
        return dataclasses.replace(reference_kernels(forms, False), reasons=("reference: asked for",))
    reasons = ()
    for name, why_not, kernels, card in (("mosaic", _why_not_mosaic, _mosaic, "a Hopper"),
                                         ("triton", _why_not_triton, _triton, "an Ampere or an Ada")):
        if want not in ("auto", name):
            continue
        reason = why_not(platform, compute_capability, head_dim, dtype, page_size)
        if reason is None:
            why = "asked for" if want == name else f"the device is {card} and the model fits"
            return dataclasses.replace(kernels(), reasons=reasons + (f"{name}: {why}",))
        if want == name:
            raise ValueError(reason)
        reasons += (reason,)
    if platform in ("gpu", "cuda"):
        reasons += ("reference: XLA picks matrix products by shape on a GPU, so bits may depend on the batch",)
    return dataclasses.replace(reference_kernels(forms, False), reasons=reasons)
