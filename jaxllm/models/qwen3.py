"""Qwen3 (arXiv:2505.09388): each head of q and k is normed, head_dim is its own, biases only where asked."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like, qwen_windows, silent


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a Qwen3ForCausalLM config.json."""
    config = silent(config, 32, head_dim=128, max_position_embeddings=32768, sliding_window=4096)
    bias = bool(config.get("attention_bias"))
    return llama_like(config, max_model_len, windows=qwen_windows(config), unread=("mlp_bias",), qkv_bias=bias, o_bias=bias, qk_norm=True)
