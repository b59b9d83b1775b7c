"""Language-model inference in pure JAX and Pallas, in which the same request always gives the same bits."""
import importlib

_LAZY = {
    "LLM": "jaxllm.llm",
    "SamplingParams": "jaxllm.sampling_params",
    "RequestOutput": "jaxllm.outputs",
    "CompletionOutput": "jaxllm.outputs",
    "Logprob": "jaxllm.outputs",
    "load_params": "jaxllm.functional",
    "logprobs": "jaxllm.functional",
    "JaxllmError": "jaxllm.errors",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str):
    """Names are imported when asked for, so that `import jaxllm` costs nothing and starts no device."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__():
    return sorted(list(globals()) + __all__)
