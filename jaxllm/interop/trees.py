"""Parameter pytrees as nested dicts of their leaf paths, and back: what the flax and orbax bridges share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxllm.errors import CheckpointError


def nested(params: Any, leaf: Callable[[Any], Any] = lambda value: value, index: Callable[[int], Any] = str) -> dict:
    """The leaves of `params`, each through `leaf`, in dicts by field name, dict key and `index` of a tuple's position."""
    root: dict = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        keys = [_key(entry, index) for entry in path]
        if not keys:
            raise TypeError("a single array is no parameter tree; give the pytree that holds it")
        inner = root
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = leaf(value)
    return root


def rebuilt(found: Iterable[tuple[tuple, Any]], template: Any, what: str) -> Any:
    """`template` with its leaves replaced by those of `found`, (path, value) pairs; positions may be ints or text.

    Raises CheckpointError that lists what `what` lacks, has too much, or has in another shape or dtype.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {tuple(_key(entry, str) for entry in path): leaf for path, leaf in leaves}
    values = {tuple(map(str, path)): value for path, value in found}
    problems = [f"{'.'.join(path)} is missing" for path in wanted if path not in values]
    problems += [f"{'.'.join(path)} is unexpected" for path in values if path not in wanted]
    for path, leaf in wanted.items():
        if path in values and (values[path].shape, values[path].dtype) != (leaf.shape, leaf.dtype):
            is_now, was = (f"{value.dtype}{list(value.shape)}" for value in (values[path], leaf))
            problems.append(f"{'.'.join(path)} is {is_now} and must be {was}")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{what} does not fit the model: {', '.join(problems[:6])}{more}; cast or rename what was changed")
    return jax.tree_util.tree_unflatten(treedef, [values[path] for path in wanted])


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None, path: tuple = ()) -> Iterable[tuple[tuple, Any]]:
    """(path, value) of every leaf of nested mappings."""
    if isinstance(tree, Mapping) and not (is_leaf and is_leaf(tree)):
        for key, value in tree.items():
            yield from paths(value, is_leaf, (*path, key))
    else:
        yield path, tree


def _key(entry: Any, index: Callable[[int], Any]) -> Any:
    if isinstance(entry, jax.tree_util.SequenceKey):
        return index(entry.idx)
    return str(entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else entry.key)
