"""Architecture string of a config.json -> the module that reads it. Modules are imported when asked for."""
import importlib

from jaxllm.checkpoint.mapped import brief
from jaxllm.errors import UnsupportedError
from jaxllm.fields import CHANGING, FIELDS, check_fields, refuse_changing

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def architecture(config: dict) -> str:
    """The architecture of a config.json's contents: the known one that it names, or by its model_type if it names none."""
    names, kind = config.get("architectures") or [], config.get("model_type")
    known = next((name for name in names or [name for name, module in FAMILIES.items() if module == kind] if name in FAMILIES), None)
    if known is None:
        said = ", ".join(map(brief, names[:4])) or f"missing from config.json, and model_type {brief(kind)} names none"
        raise UnsupportedError(f"architecture {said} is not supported; supported: {', '.join(FAMILIES)}")
    if kind in FAMILIES.values() and kind != FAMILIES[known]:
        raise UnsupportedError(f"config.json names the architecture {known} and the model_type {kind}, which say different things; correct one")
    return known


def family(config: dict):
    """The family module (`read_config`, `RULES`) of a config.json's contents, its fields checked; unknown ones are refused by name."""
    check_fields(config, FIELDS)
    if config.get("quantization_config"):
        method = brief(config["quantization_config"].get("quant_method", "unnamed"))
        raise UnsupportedError(f"quantization method {method} is not supported; use a checkpoint in float32, bfloat16 or float16")
    known = architecture(config)
    refuse_changing(config, CHANGING)
    return importlib.import_module(f"jaxllm.models.{FAMILIES[known]}")
