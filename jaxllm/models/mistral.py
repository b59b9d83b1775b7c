"""Mistral (arXiv:2310.06825): Llama's structure with a sliding window over every layer."""
from jaxllm.config import ModelConfig
from jaxllm.models.families import LLAMA_RULES as RULES  # noqa: F401  (read through the registry)
from jaxllm.models.families import field, llama_like


def read_config(config: dict, max_model_len: int | None = None) -> ModelConfig:
    """The ModelConfig of a MistralForCausalLM config.json."""
    window = config.get("sliding_window", 4096)  # null means none; absent means what the first Mistral had
    return llama_like(config, max_model_len, windows=(window,) * field(config, "num_hidden_layers"))
