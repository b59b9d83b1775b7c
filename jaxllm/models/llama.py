"""Llama (arXiv:2302.13971, 2407.21783) and what shares its architecture string: SmolLM2, Yi, TinyLlama, distillations."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a LlamaForCausalLM config.json."""
    bias = config.get("attention_bias", False)
    return llama_like(config, max_model_len, qkv_bias=bias, o_bias=bias, mlp_bias=config.get("mlp_bias", False))
