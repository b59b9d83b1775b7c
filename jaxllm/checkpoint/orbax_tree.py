"""Arrays of an orbax checkpoint as lazy tensors, each read alone by tensorstore.

Orbax writes one zarr array per leaf, named by the leaf's path, and a _METADATA file that lists the leaves. Restoring one
array through orbax costs the structure of the whole tree (32 ms of 200 arrays), opening it in zarr 0.6 ms.
"""

import json
import logging
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.mapped import LazyTensor, brief, checked_shape
from jaxllm.errors import CheckpointError, UnsupportedError

log = logging.getLogger("jaxllm.checkpoint")
MAX_METADATA_BYTES = 256 << 20
ARRAY_TYPES = ("jax.Array", "np.ndarray")  # what orbax calls the leaves that have a zarr array; numbers and text are apart


def read_orbax(folder: Path) -> dict[str, LazyTensor]:
    """Every array of the checkpoint under its path, joined with dots; CheckpointError for what cannot be opened."""
    import tensorstore

    root = (folder if (folder / "_METADATA").is_file() else folder / "default").absolute()
    layout = _metadata(root / "_METADATA")
    context = tensorstore.Context()
    tensors: dict[str, LazyTensor] = {}
    others = []
    for name, kind in _leaves(root, layout):
        if kind not in ARRAY_TYPES:
            others.append(name)
            continue
        if ".." in name.split("/") or name.startswith("/") or "\0" in name:
            raise CheckpointError(f"{folder}: array {brief(name)} has a name that leads outside the checkpoint; refused")
        store = {"driver": "ocdbt", "base": f"file://{root}/", "path": f"{name}/"} if layout.get("use_ocdbt") else {"driver": "file", "path": f"{root}/{name}/"}
        spec = {"driver": "zarr3" if layout.get("use_zarr3") else "zarr", "kvstore": store}
        tensors[name] = _tensor(folder, name, spec, context)
    if others:
        log.info("%s: %d entries are no arrays and are left out, the first is %s", folder, len(others), others[0])
    return tensors


def _metadata(file: Path) -> dict:
    try:
        if file.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError(f"more than {MAX_METADATA_BYTES} bytes")
        layout = json.loads(file.read_bytes())
        if not isinstance(layout, dict) or not isinstance(layout["tree_metadata"], dict):
            raise ValueError("it has no tree_metadata")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({brief(str(error))}): this is no whole orbax checkpoint; write or copy it again") from error
    return layout


def _leaves(root: Path, layout: dict) -> list[tuple[str, str]]:
    """Name and kind of each leaf."""
    try:
        entries = layout["tree_metadata"].values()
        return [(".".join(str(key["key"]) for key in entry["key_metadata"]), entry["value_metadata"]["value_type"]) for entry in entries]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{root / '_METADATA'} describes a leaf without its key or type; write or copy the checkpoint again") from error


def _tensor(folder: Path, name: str, spec: dict, context: object) -> LazyTensor:
    import tensorstore

    where = f"{folder}: array {brief(name)}"

    def opened():
        try:
            return tensorstore.open(spec, context=context, open=True, read=True).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{where} cannot be opened ({brief(str(error), 200)}); write or copy the checkpoint again") from error

    array = opened()
    dtype = np.dtype(array.dtype.numpy_dtype)
    if dtype.kind not in "biufcV":
        raise UnsupportedError(f"{where} has dtype {dtype}; allowed are booleans, integers, floats and complex numbers")
    shape = checked_shape(tuple(array.shape), dtype, where)

    def read() -> np.ndarray:
        try:
            values = np.asarray(opened().read().result())
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{where} cannot be read ({brief(str(error), 200)}); write or copy the checkpoint again") from error
        if values.shape != shape or values.dtype != dtype:
            raise CheckpointError(f"{where} changed while it was open; load it again")
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
