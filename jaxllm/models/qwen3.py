"""Qwen3 (arXiv:2505.09388): each head of q and k is normed, head_dim is its own, biases only where asked."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like, windows_by_type


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a Qwen3ForCausalLM config.json."""
    bias = config.get("attention_bias", False)
    config = {"head_dim": 128, **config}  # what Qwen3 takes when its config is silent
    return llama_like(config, max_model_len, windows=windows_by_type(config), qkv_bias=bias, o_bias=bias, qk_norm=True)
