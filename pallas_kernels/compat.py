"""What differs between the versions of jax we run on: one line for each difference, with the version that brought it."""
import contextlib

import jax
from jax.experimental.pallas import mosaic_gpu as plmgpu

# jax 0.11.2 and 0.12.0.1 both have these; they are here because jax calls the module experimental.
kernel = plmgpu.kernel                # 0.10.2: out_type= and scratch_types=, before it out_shape= and scratch_shapes=
layout_cast = plmgpu.layout_cast      # 0.11.2: the interpreter has a rule for it


def transposed(ref):
    """The [b, a] view of a shared-memory ref [a, b]."""
    if hasattr(ref, "transpose"):  # 0.12.0
        return ref.transpose((1, 0))
    return plmgpu.transpose_ref(ref, (1, 0))  # deprecated in 0.12.0


def store(ref, value):
    """Write registers to device memory."""
    if hasattr(plmgpu, "store"):  # 0.12.0, where a plain assignment to device memory wants optimized=False said
        plmgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


@contextlib.contextmanager
def interpreting():
    """Inside, Mosaic kernels run on the CPU, simulated, and a tile's products are added in ascending k.

    The simulator's own matmul is a BLAS, which gives a row other bits at another place in the tile; wgmma does not. It blocks one
    of XLA's threads for each warpgroup that waits, and can hang on the two threads of two cores: NPROC=16 in the environment,
    before jax starts, gives it more.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    # 0.12.0 exports it as plmgpu.force_gpu_interpret_mode; 0.11.2 has it here only
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode
    numpy = gpu_callbacks.np
    gpu_callbacks.np = _Ordered(numpy)
    try:
        with force_gpu_interpret_mode():
            yield
    finally:
        gpu_callbacks.np = numpy


@contextlib.contextmanager
def interpreting_triton():
    """Inside, Triton kernels run on the CPU: their bodies become XLA operations, one block of the grid after another."""
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode  # 0.11.2: its value wins over interpret=
    with force_gpu_interpret_mode(True):
        yield


def no_triton() -> str | None:
    """Why Pallas has no Triton backend here, or None if it has one. Deprecated in 0.11.2 and in 0.12.0."""
    try:
        from jax.experimental.pallas import triton
        triton.CompilerParams(num_warps=4, num_stages=1)
    except (ImportError, AttributeError, TypeError) as error:
        return f"jax {jax.__version__} has no Triton backend for Pallas ({error})"
    return None


def named(name, body, **static):
    """`body` with `static` bound, as a function of that name: Triton names a kernel after its function, even inside a partial."""
    def kernel(*refs):
        body(*refs, **static)
    kernel.__name__ = kernel.__qualname__ = name
    return kernel


class _Ordered:
    """numpy with a matmul of one order."""

    def __init__(self, numpy):
        self._numpy = numpy

    def __getattr__(self, name):
        return getattr(self._numpy, name)

    def matmul(self, a, b, dtype):
        """a [m, k] . b [k, n], each product and each sum rounded to `dtype`."""
        a, b = a.astype(dtype), b.astype(dtype)
        out = self._numpy.zeros((a.shape[0], b.shape[1]), dtype)
        with self._numpy.errstate(all="ignore"):
            for k in range(a.shape[1]):
                out += a[:, k:k + 1] * b[k]
        return out


def under_jit() -> bool:
    """Whether a jit of the caller's is being traced. 0.11.2 and 0.12.0 both have it; nothing of it is promised."""
    from jax._src.core import unsafe_am_i_under_a_jit
    return unsafe_am_i_under_a_jit()


def version() -> tuple[int, ...]:
    """jax's version as numbers."""
    return tuple(int(part) for part in jax.__version__.split(".") if part.isdigit())
