"""The model as a function: the log-probabilities that the engine reports, from a plain call on a whole sequence."""
from functools import cache

import jax
import jax.numpy as jnp

from jaxllm.engine.runner import own_configuration
from jaxllm.errors import UsageError
from jaxllm.loading import load_model
from jaxllm.machine import facts, forms
from jaxllm.models import decoder
from pallas_kernels import compat
from pallas_kernels.dispatch import REFERENCE, Kernels, reference_kernels


def load_params(model: str, *, dtype: str = "auto", load_format: str = "auto", hf_overrides: dict | None = None,
                max_model_len: int | None = None, seed: int = 0, place=None, pt_load_map_location="cpu"):
    """(ModelConfig, params) of a model: what `jaxllm.models.decoder.forward` and `logprobs` take; see `LLM` for the options."""
    loaded = load_model(model, dtype=dtype, load_format=load_format, hf_overrides=hf_overrides, max_model_len=max_model_len,
                        seed=seed, place=place, pt_load_map_location=pt_load_map_location)
    return loaded.cfg, loaded.params


def logprobs(model, token_ids, *, kernels: Kernels | None = None) -> jax.Array:
    """float32 [T]: the log-probability of each of the tokens int [T] behind those before it; 0 for the first, which is given.

    `model` is an LLM, or (ModelConfig, params): then this is a differentiable, jit-able function of params. With the engine's
    kernels the values equal, bit for bit, those that it reported while it drew the same tokens. On a CPU those are the default;
    on a card they are `llm.kernels`. Under a jit of your own the compiler options are yours: give it `compiler_options=` those of
    `jaxllm.functional.plain_kernels(cfg, dtype)`, or the sums may have another order.
    """
    if not isinstance(model, tuple):
        kernels = kernels or reference_kernels(model.kernels.forms, True)
        model = model.model_config, model.params
    cfg, params = model
    kernels = kernels or plain_kernels(cfg, params.embedding.dtype)
    tokens = jnp.asarray(token_ids, jnp.int32)
    if tokens.ndim != 1 or tokens.shape[0] < 1:
        raise UsageError(f"token_ids has the shape {tokens.shape}; it must be one sequence of at least one token", "token_ids")
    with own_configuration():
        # jax takes compiler options at the outermost jit alone
        run = _logprobs if compat.under_jit() else _program(tuple(kernels.compiler_options.items()))
        return run(params, tokens, cfg=cfg, kernels=kernels)


def plain_kernels(cfg, dtype) -> Kernels:
    """The differentiable kernels in XLA with the bits of an engine's, for a model in `dtype` on the default device."""
    if jax.default_backend() != "cpu":
        return REFERENCE
    return reference_kernels(forms(decoder.product_shapes(cfg), str(dtype), False, facts(None)), True)


@cache
def _program(options: tuple):
    return jax.jit(_logprobs, static_argnames=("cfg", "kernels"), compiler_options=dict(options) or None)


def _logprobs(params, tokens, *, cfg, kernels):
    hidden = decoder.whole(cfg, params, tokens[None], kernels=kernels)[0]
    logits = decoder.unembed(cfg, params, hidden, kernels=kernels)[:-1]
    own = jnp.take_along_axis(logits, tokens[1:, None], 1)[:, 0] - kernels.log_sum_exp(logits)
    return jnp.concatenate([jnp.zeros(1, jnp.float32), own])
