"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115): biases on q, k and v, windows on the upper layers where asked."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like, qwen_windows, silent


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a Qwen2ForCausalLM config.json."""
    config = silent(config, 32, max_position_embeddings=32768, sliding_window=4096)
    return llama_like(config, max_model_len, windows=qwen_windows(config), unread=("mlp_bias",), qkv_bias=True)
