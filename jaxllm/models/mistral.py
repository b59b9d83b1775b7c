"""Mistral (arXiv:2310.06825): Llama's structure with a sliding window over every layer, or over those that layer_types names."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import llama_like, refuse_window, silent, windows_by_type


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a MistralForCausalLM config.json."""
    # A null window means none; an absent one means what the first Mistral had.
    config = silent(config, 8, max_position_embeddings=131072, sliding_window=4096)
    if config.get("use_sliding_window") is False:
        refuse_window(config, max_model_len, "use_sliding_window is false")
    windows = windows_by_type(config, config["sliding_window"], lambda layer: "sliding_attention")
    return llama_like(config, max_model_len, windows=windows, unread=("attention_bias", "mlp_bias"))
