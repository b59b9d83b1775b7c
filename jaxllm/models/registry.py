"""Architecture string of a config.json -> the module that reads it. Modules are imported when asked for."""
import importlib

from jaxllm.errors import UnsupportedError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def family(config: dict):
    """The family module (`read_config`, `RULES`) of a config.json's contents; unknown ones are refused by name."""
    names = config.get("architectures") or []
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise UnsupportedError(f"quantization method {method!r} is not supported; use a checkpoint in float32, bfloat16 or float16")
    for name in names:
        if name in FAMILIES:
            return importlib.import_module(f"jaxllm.models.{FAMILIES[name]}")
    raise UnsupportedError(f"architecture {', '.join(names) or 'missing from config.json'} is not supported; "
                           f"supported: {', '.join(FAMILIES)}")
