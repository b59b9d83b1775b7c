"""Parameters to and from flax: a linen variable dict or an nnx State, so that the usual training tools apply.

    variables = to_linen(llm.params)                 # {"params": {"layers": {"0": {"q": ...}}}}
    llm.params = from_linen(variables, llm.params)   # the second argument says the structure
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxllm.errors import CheckpointError
from jaxllm.interop.trees import nested, paths, rebuilt


def to_linen(params: Any) -> dict[str, dict]:
    """{"params": nested dict} with the same arrays; positions of a tuple become the keys "0", "1", ..."""
    return {"params": nested(params)}


def from_linen(variables: Mapping[str, Any], template: Any) -> Any:
    """The pytree of `template`'s structure with the arrays of `variables["params"]`.

    `template` is any pytree of that structure: parameters, or jax.ShapeDtypeStruct. CheckpointError lists what does
    not fit; nothing is cast.
    """
    if "params" not in variables or len(variables) > 1:
        raise CheckpointError(f"the linen variables hold the collections {sorted(variables)}; params alone is wanted")
    return rebuilt(paths(variables["params"]), template, "the linen variable tree")


def to_nnx(params: Any) -> nnx.State:
    """An nnx.State of nnx.Param with the same arrays; positions of a tuple become integer keys, as in nnx.List."""
    return nnx.State(nested(params, nnx.Param, int))


def from_nnx(state: Any, template: Any) -> Any:
    """The pytree of `template`'s structure with the arrays of an nnx.State (or of an nnx module's Params)."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state, nnx.Param)
    found = [(path, leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf) for path, leaf in nnx.to_flat_state(state)]
    return rebuilt(found, template, "the nnx state")
