"""Keys and values into their pages on Hopper: one launch writes both, in place.

Grid and memory. A block takes 8 tokens: two TMA copies bring their keys and values [8, K, H] to shared memory, and each
token whose slot lies inside the cache is stored by a TMA copy of [K, H] to pages[slot // page_size, slot % page_size].

    device  k [T, K, H] --TMA--> shared [8, K, H] --TMA--> k_pages[page, offset]     aliased with the input: no copy
            v [T, K, H] --TMA--> shared [8, K, H] --TMA--> v_pages[page, offset]

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


def _write(k, v, slots, k_pages, v_pages, k_smem, v_smem, full):
    first = lax.axis_index("block") * TOKENS
    plmgpu.copy_gmem_to_smem(k.at[pl.ds(first, TOKENS)], k_smem, full)
    plmgpu.copy_gmem_to_smem(v.at[pl.ds(first, TOKENS)], v_smem, full)
    plmgpu.barrier_wait(full)
    tokens, page_size = slots.shape[0], k_pages.shape[1]

    def store(i, _):
        slot = slots[jnp.minimum(first + i, tokens - 1)]

        @pl.when((first + i < tokens) & (slot >= 0) & (slot < k_pages.shape[0] * page_size))
        def _():
            page, place = lax.div(slot, page_size), lax.rem(slot, page_size)
            plmgpu.copy_smem_to_gmem(k_smem.at[i], k_pages.at[page, place])
            plmgpu.copy_smem_to_gmem(v_smem.at[i], v_pages.at[page, place])
    lax.fori_loop(0, TOKENS, store, None)
    plmgpu.wait_smem_to_gmem(0)


@jax.jit  # a program of many layers then lowers the kernel once
def write_kv(k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(k_pages, v_pages) [num_pages, page_size, K, H] with k and v [T, K, H] stored at slots int32 [T]; others dropped."""
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    shared = plmgpu.SMEM((TOKENS, *k.shape[1:]), k_pages.dtype)
    compat.kernel(
        _write, out_type=(), scratch_types=[shared, shared, plmgpu.Barrier(num_arrivals=2)],
        grid=(pl.cdiv(k.shape[0], TOKENS),), grid_names=("block",),
    )(k.astype(k_pages.dtype), v.astype(v_pages.dtype), slots, k_ref, v_ref)
    return jax.freeze(k_ref), jax.freeze(v_ref)
