"""Weights from every container users have, without torch: open them lazily, match names by rules, stream to devices.

`open_checkpoint` and the rules are here; `load_params` and `dummy_params`, which need jax, are in `.load`.
"""

from jaxllm.checkpoint.index import Checkpoint, LazyTensor, open_checkpoint
from jaxllm.checkpoint.rules import Concat, Identity, Ignore, Reshape, Rule, Slice, Stack, Transpose

__all__ = [
    "Checkpoint",
    "Concat",
    "Identity",
    "Ignore",
    "LazyTensor",
    "Reshape",
    "Rule",
    "Slice",
    "Stack",
    "Transpose",
    "open_checkpoint",
]
