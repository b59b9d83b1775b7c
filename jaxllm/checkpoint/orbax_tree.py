"""Arrays of an orbax checkpoint as lazy tensors: orbax says what is there, tensorstore reads one array at a time.

Restoring through orbax reads the whole tree, or costs its whole structure for each array asked (32 ms of 200 arrays);
the arrays lie in zarr under names that orbax's metadata gives, and opening one takes 0.6 ms.
"""

import json
import logging
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.mapped import LazyTensor, brief, checked_shape
from jaxllm.errors import CheckpointError, UnsupportedError

log = logging.getLogger("jaxllm.checkpoint")


def read_orbax(folder: Path) -> dict[str, LazyTensor]:
    """Every array of the checkpoint under its path, joined with dots; CheckpointError for what orbax cannot open."""
    import jax
    import orbax.checkpoint as ocp
    import tensorstore

    root = folder if (folder / "_METADATA").is_file() else folder / "default"
    try:
        layout = json.loads((root / "_METADATA").read_text())
        tree = ocp.PyTreeCheckpointer().metadata(root.absolute()).item_metadata.tree
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda value: hasattr(value, "shape"))
    except Exception as error:  # orbax reports a damaged folder by whatever its layers happen to raise
        raise CheckpointError(f"{folder} is a damaged orbax checkpoint ({brief(str(error))}); write or copy it again") from error
    context = tensorstore.Context()
    driver = "zarr3" if layout.get("use_zarr3") else "zarr"
    tensors: dict[str, LazyTensor] = {}
    others = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if getattr(leaf, "storage", None) is None:
            others.append(name)
            continue
        if ".." in name.split("/") or name.startswith("/"):
            raise CheckpointError(f"{folder}: array {brief(name)} has a name that leads outside the checkpoint; refused")
        if layout.get("use_ocdbt"):
            store = {"driver": "ocdbt", "base": f"file://{root.absolute()}/", "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{root.absolute()}/{name}/"}
        dtype = np.dtype(leaf.dtype)
        if dtype.kind not in "biufcV":
            raise UnsupportedError(f"{folder}: array {brief(name)} has dtype {dtype}; allowed are booleans, integers, floats and complex numbers")
        shape = checked_shape(tuple(leaf.shape), dtype, f"{folder}: array {brief(name)}")
        tensors[name] = _tensor(folder, name, shape, dtype, {"driver": driver, "kvstore": store}, context)
    if others:
        log.info("%s: %d entries are no arrays and are left out, the first is %s", folder, len(others), others[0])
    return tensors


def _tensor(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, spec: dict, context: object) -> LazyTensor:
    def read() -> np.ndarray:
        import tensorstore

        try:
            values = np.asarray(tensorstore.open(spec, context=context, open=True, read=True).result().read().result())
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: array {brief(name)} cannot be read ({brief(str(error), 200)}); write or copy it again") from error
        if values.shape != shape or values.dtype != dtype:
            raise CheckpointError(f"{folder}: array {brief(name)} is {values.dtype} {list(values.shape)}, its metadata say {dtype} {list(shape)}")
        values.flags.writeable = False
        return values

    return LazyTensor(name=name, shape=shape, dtype=dtype, container="orbax", file=folder, storage=f"{folder.name}:{name}", read=read)


def write_orbax(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """None; `folder` holds the arrays as an orbax checkpoint, a flat dict from name to array."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(folder.absolute(), arrays)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UnsupportedError(f"orbax cannot write {folder.name}: {brief(str(error), 200)}; convert to safetensors or npz") from error
