"""Parameters to and from an orbax checkpoint, sharded as they are and as they shall be, bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxllm.checkpoint.mapped import brief
from jaxllm.errors import CheckpointError, UsageError
from jaxllm.interop.trees import nested, paths, rebuilt


def save_params(path: str | os.PathLike, params: Any, *, overwrite: bool = False) -> Path:
    """The folder that now holds `params`, each process having written the shards it owns; complete when this returns."""
    target = Path(path).expanduser().absolute()
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists already; remove it, give another name, or say overwrite=True", "path")
    with ocp.StandardCheckpointer() as writer:
        writer.save(target, nested(params), force=overwrite)
    return target


def restore_params(
    path: str | os.PathLike, template: Any, *, sharding: Callable[[str, Any], jax.sharding.Sharding] | jax.sharding.Sharding | None = None
) -> Any:
    """The pytree of `template`'s structure with the arrays that `save_params` wrote to `path`.

    `template`: parameters or jax.ShapeDtypeStruct. `sharding`: one for all, or a function of (leaf path, leaf); default
    is the leaf's own, else JAX's default device. Each process reads only its shards. Nothing is cast or reshaped:
    CheckpointError says what differs.
    """
    source = Path(path).expanduser().absolute()
    if not (source / "_METADATA").is_file():
        raise CheckpointError(f"{source} is no orbax checkpoint that save_params wrote (no _METADATA); check the path")

    def target(key_path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(key_path, simple=True, separator=".")
        own = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        chosen = own if sharding is None else sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(name, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chosen)

    abstract = jax.tree_util.tree_map_with_path(target, template)
    with ocp.StandardCheckpointer() as reader:
        try:
            # Compared before reading: orbax would cast and pad silently to the template's dtype and shape.
            rebuilt(paths(_stored(reader, source)), template, f"the orbax checkpoint {source}")
            restored = reader.restore(source, nested(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{source} cannot be restored ({brief(str(error), 200)}); write it again") from error
    return rebuilt(paths(restored), template, f"the orbax checkpoint {source}")


def _stored(reader: ocp.StandardCheckpointer, source: Path) -> Any:
    """What orbax says of each leaf: something with shape and dtype."""
    return reader.metadata(source).item_metadata.tree
