"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115): biases on q, k and v, windows on the upper layers where asked."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like, windows_by_type


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a Qwen2ForCausalLM config.json."""
    return llama_like(config, max_model_len, windows=windows_by_type(config), qkv_bias=True)
