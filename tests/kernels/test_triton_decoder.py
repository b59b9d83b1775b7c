"""A whole decoder on the Triton kernels, interpreted: a row's hidden states and logits in every kind of step and company."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import bits

from jaxllm.config import LayerSpec, ModelConfig, RopeSpec
from jaxllm.models import decoder
from pallas_kernels.ragged import Ragged

pytest.importorskip("jax.experimental.pallas.triton")
pytestmark = pytest.mark.usefixtures("interpreted_triton")
HEAD, PAGE, PAGES, NOWHERE = 16, 16, 12, 2 ** 30
SPEC = LayerSpec(RopeSpec(tuple(10000.0 ** (-2 * i / HEAD) for i in range(HEAD // 2))))
CFG = ModelConfig("LlamaForCausalLM", 300, 320, 96, 4, 2, HEAD, 1e-5, 256, (SPEC,), tied=True, qkv_bias=True)  # two chunks of K


def step(kernels, params, cache, parts, decode=False, padding=2):
    """(hidden, logits, cache) of a step over parts [(tokens, first position, table)], some padding after them."""
    tokens = np.concatenate([t for t, _, _ in parts] + [np.zeros(padding, int)])
    positions = np.concatenate([np.arange(first, first + len(t)) for t, first, _ in parts] + [np.zeros(padding, int)])
    owner = np.repeat(range(len(parts) + 1), [len(t) for t, _, _ in parts] + [padding])
    tables = np.stack([table for _, _, table in parts] + [parts[0][2]])
    slots = np.where(owner < len(parts), tables[owner, positions // PAGE] * PAGE + positions % PAGE, NOWHERE)
    empty = padding if decode else 0
    ragged = Ragged(*(jnp.asarray(a, jnp.int32) for a in (
        positions, slots, [first + len(t) for t, first, _ in parts] + [0] * empty,
        np.concatenate([tables[:-1], tables[-1:].repeat(empty, 0)]))),
        None if decode else jnp.asarray(np.cumsum([0] + [len(t) for t, _, _ in parts]), jnp.int32))

    @partial(jax.jit, donate_argnums=1)
    def program(params, cache, tokens, ragged):
        hidden, cache = decoder.forward(CFG, params, cache, tokens, ragged, kernels=kernels)
        return hidden, decoder.unembed(CFG, params, hidden, kernels=kernels), cache
    return program(params, cache, jnp.asarray(tokens, jnp.int32), ragged)


def test_a_row_alone_in_a_prompt_and_in_a_crowd_has_the_same_bits_through_a_decoder():
    from pallas_kernels.dispatch import _triton
    kernels = _triton()
    leaves, tree = jax.tree.flatten(decoder.template(CFG, jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = jax.tree.unflatten(tree, [(jax.random.normal(key, a.shape) * a.shape[-1] ** -0.5).astype(a.dtype)
                                       for key, a in zip(keys, leaves)])
    rng = np.random.default_rng(1)
    ours, other = rng.integers(300, size=70), rng.integers(300, size=21)
    fresh = lambda: jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), decoder.empty_cache(CFG, PAGES, PAGE, jnp.bfloat16))

    table, beside = [9, 1, 3, 0, 2], [10, 11, 11, 11, 11]
    whole, whole_logits, cache = step(kernels, params, fresh(), [(ours, 0, table)], padding=0)
    # In a crowd: what follows the first 30 tokens again, on pages that hold only those, beside another sequence; then a decode
    # step for both.
    cache = jax.tree.map(lambda pages: pages.at[jnp.asarray(table[2:])].set(jnp.nan), cache)
    second, _, cache = step(kernels, params, cache, [(other[:20], 0, beside), (ours[30:69], 30, table)])
    kept = jax.tree.map(jnp.copy, cache)
    last, logits, _ = step(kernels, params, cache, [(other[20:], 20, beside), (ours[69:], 69, table)], decode=True)
    np.testing.assert_array_equal(bits(second)[20:59], bits(whole)[30:69])
    np.testing.assert_array_equal(bits(last)[1], bits(whole)[69])
    np.testing.assert_array_equal(bits(logits)[1], bits(whole_logits)[69])
    alone, logits, _ = step(kernels, params, kept, [(ours[69:], 69, table)], decode=True, padding=0)
    np.testing.assert_array_equal(bits(alone)[0], bits(whole)[69])
    np.testing.assert_array_equal(bits(logits)[0], bits(whole_logits)[69])
    np.testing.assert_array_equal(bits(kernels.log_sum_exp(logits))[0], bits(kernels.log_sum_exp(whole_logits))[69])
    assert np.isfinite(np.asarray(whole_logits)).all()
