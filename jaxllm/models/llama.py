"""Llama (arXiv:2302.13971, 2407.21783) and what shares its architecture string: SmolLM2, Yi, TinyLlama, distillations."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like, refuse_window, silent, windows_by_type


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a LlamaForCausalLM config.json."""
    config = silent(config, max_position_embeddings=2048)
    if config.get("use_sliding_window") is not False:
        refuse_window(config, max_model_len, "the architecture is Llama's, which has none")
    windows = windows_by_type(config, None, lambda layer: "full_attention")
    bias = bool(config.get("attention_bias"))
    return llama_like(config, max_model_len, windows=windows, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias")))
