"""What differs between the versions of jax we run on: one line for each difference, with the version that brought it."""
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


def interpreting():
    """A context in which Mosaic kernels run on the CPU, simulated."""
    # 0.12.0 exports it as plmgpu.force_gpu_interpret_mode; 0.11.2 has it here only
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode
    return force_gpu_interpret_mode()


def version() -> tuple[int, ...]:
    """jax's version as numbers."""
    return tuple(int(part) for part in jax.__version__.split(".") if part.isdigit())
