"""Keys and values into their pages on Hopper: one launch writes both, in place.

Grid and memory. A block takes 8 tokens: a TMA copy brings their keys and values [8, 2, K, H] to shared memory, and of each
token whose slot lies inside the cache both are stored by TMA copies of [K, H] to pages[slot // page_size, slot % page_size].

    device  kv [T, 2, K, H] --TMA--> shared [8, 2, K, H] --TMA--> k_pages[page, offset], v_pages[page, offset]
                                                                  aliased with the inputs: no copy

Keys and values come as one array, so that XLA makes both, rotation, sums and all, in one fusion.

Nothing is summed, so there is no tree. A slot below 0 or past the end starts no copy: padding is dropped and nothing is
ever written outside the cache. Two live tokens never share a slot.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plmgpu

from pallas_kernels import compat

TOKENS = 8  # of one block


def _write(kv, slots, k_pages, v_pages, kv_smem, full):
    first = lax.axis_index("block") * TOKENS
    plmgpu.copy_gmem_to_smem(kv.at[pl.ds(first, TOKENS)], kv_smem, full)
    plmgpu.barrier_wait(full)
    tokens, page_size = slots.shape[0], k_pages.shape[1]

    def store(i, _):
        slot = slots[jnp.minimum(first + i, tokens - 1)]

        @pl.when((first + i < tokens) & (slot >= 0) & (slot < k_pages.shape[0] * page_size))
        def _():
            page, place = lax.div(slot, page_size), lax.rem(slot, page_size)
            plmgpu.copy_smem_to_gmem(kv_smem.at[i, 0], k_pages.at[page, place])
            plmgpu.copy_smem_to_gmem(kv_smem.at[i, 1], v_pages.at[page, place])
    lax.fori_loop(0, TOKENS, store, None)
    plmgpu.wait_smem_to_gmem(0)


@jax.jit  # a program of many layers then lowers the kernel once
def write_kv(k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(k_pages, v_pages) [num_pages, page_size, K, H] with k and v [T, K, H] stored at slots int32 [T]; others dropped."""
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    kv = jnp.stack([k, v], 1).astype(k_pages.dtype)
    compat.kernel(
        _write, out_type=(), scratch_types=[plmgpu.SMEM((TOKENS, *kv.shape[1:]), kv.dtype), plmgpu.Barrier()],
        grid=(pl.cdiv(k.shape[0], TOKENS),), grid_names=("block",),
    )(kv, slots, k_ref, v_ref)
    return jax.freeze(k_ref), jax.freeze(v_ref)
