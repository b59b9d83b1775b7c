"""A parameter pytree from a checkpoint: every target leaf filled once, one tensor in host memory at a time."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.copying import aligned_empty, copy_cast
from jaxllm.checkpoint.index import Checkpoint
from jaxllm.checkpoint.map_location import MapLocation, check_map_location, device_for
from jaxllm.checkpoint.report import mismatch_report
from jaxllm.checkpoint.rules import Concat, Fill, Ignore, Rule, Stack, match
from jaxllm.checkpoint.transforms import chain_shape
from jaxllm.errors import CheckpointError, UsageError

log = logging.getLogger("jaxllm.checkpoint")

# (path of the leaf, its values: on the host, or on the device that map_location named) -> the array where it shall live.
type Place = Callable[[str, np.ndarray | jax.Array], jax.Array]


def load_params(
    checkpoint: Checkpoint,
    rules: Iterable[Rule | Ignore],
    template: Any,
    *,
    dtype: Any = None,
    place: Place | None = None,
    map_location: MapLocation = "cpu",
) -> Any:
    """`template` with each jax.ShapeDtypeStruct replaced by the jax.Array that the checkpoint holds for it.

    Leaf paths are the template's key paths joined with ".", such as layers.3.attention.q. `dtype` replaces the dtype
    of the template's floating leaves; integers and booleans stay. `place(path, array)` puts one array on its devices
    (default: the device that `map_location` names, else JAX's default device); `map_location` is pt_load_map_location,
    see `map_location.device_for`. Targets that read the same bytes the same way share one array unless `place` is
    given. Raises one CheckpointError that lists all missing, unexpected and wrong-shaped tensors before any is read.
    """
    check_map_location(map_location)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    targets = {leaf_path(path): _wanted(leaf, dtype) for path, leaf in leaves}
    found = match(rules, checkpoint, targets)
    shape_errors = [error for fill in found.fills if (error := _misfit(fill, checkpoint, targets[fill.target]))]
    if found.missing or found.unexpected or found.clashes or shape_errors:
        raise CheckpointError(mismatch_report(str(checkpoint.path), found, shape_errors))
    devices = {fill.target: device_for(checkpoint[fill.sources[0]], map_location) for fill in found.fills}
    arrays: dict[str, jax.Array] = {}
    shared: dict[tuple, jax.Array] = {}
    for fill in sorted(found.fills, key=lambda fill: _file_order(checkpoint, fill)):
        want = targets[fill.target]
        identity = (*(checkpoint[name].identity for name in fill.sources), fill.chain, want.dtype, devices[fill.target])
        if place is None and identity in shared:
            arrays[fill.target] = shared[identity]
            continue
        arrays[fill.target] = shared[identity] = _put(fill, checkpoint, want, place, devices[fill.target])
    return jax.tree_util.tree_unflatten(treedef, [arrays[leaf_path(path)] for path, _ in leaves])


def dummy_params(template: Any, seed: int = 0, *, dtype: Any = None, place: Place | None = None) -> Any:
    """`template` filled with random weights that depend on `seed` and the leaf paths alone, for --load-format dummy.

    Normal with scale 0.02; leaves whose path says norm are near 1, biases near 0; integer leaves are 0 or 1. Values
    repeat every 1048573 (a prime, so that rows differ): 8B parameters then cost a copy and not 8 billion draws.
    """
    pool = np.random.Generator(np.random.Philox(seed)).standard_normal(_POOL, dtype=np.float32) * np.float32(0.02)
    pools: dict[tuple[str, np.dtype], np.ndarray] = {}

    def pool_of(kind: str, kind_dtype: np.dtype) -> np.ndarray:
        if (kind, kind_dtype) not in pools:
            values = {"scale": pool + 1, "weight": pool, "integer": pool > 0}[kind]
            pools[kind, kind_dtype] = values.astype(kind_dtype)
        return pools[kind, kind_dtype]

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, want = leaf_path(path), _wanted(leaf, dtype)
        words = name.lower().replace("_", ".").split(".")
        is_scale = any("norm" in word for word in words) and words[-1] not in ("bias", "b")
        kind = "integer" if not jnp.issubdtype(want.dtype, jnp.inexact) else "scale" if is_scale else "weight"
        values = pool_of(kind, want.dtype)
        out = aligned_empty(want.shape, want.dtype)
        flat, start = out.reshape(-1), sum(ord(letter) * 8191**index for index, letter in enumerate(name)) % _POOL
        for begin in range(-start, flat.size, _POOL):
            window = slice(max(begin, 0), min(begin + _POOL, flat.size))
            copy_cast(values[window.start - begin : window.stop - begin], flat[window])
        return _place(place, name, out)

    return jax.tree_util.tree_map_with_path(fill, template)


_POOL = 1048573


def leaf_path(path: tuple) -> str:
    """The key path of a pytree leaf as text: layers.3.attention.q."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _wanted(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    want = leaf.dtype if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(want) != want:
        raise UsageError(f"dtype {want} needs JAX's 64-bit mode, which is off; use float32, or set jax_enable_x64 before loading", "dtype")
    return jax.ShapeDtypeStruct(leaf.shape, want)


def _misfit(fill: Fill, checkpoint: Checkpoint, want: jax.ShapeDtypeStruct) -> str | None:
    shapes = [checkpoint[name].shape for name in fill.sources]
    kinds = {_kind(checkpoint[name].dtype) for name in fill.sources}
    source = fill.sources[0] + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else "")
    try:
        shape = chain_shape(fill.chain, shapes)
    except ValueError as error:
        return f"{source}: {error}"
    if shape != tuple(want.shape):
        made = f" (from {list(shapes[0])})" if shape != shapes[0] else ""
        return f"{source} is {list(shape)}{made}, {fill.target} wants {list(want.shape)}"
    if kinds != {_kind(want.dtype)}:
        return f"{source} is {checkpoint[fill.sources[0]].dtype}, {fill.target} wants {want.dtype}"
    return None


def _kind(dtype: Any) -> str:
    for kind in (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating):
        if jnp.issubdtype(dtype, kind):
            return kind.__name__
    return str(dtype)


def _file_order(checkpoint: Checkpoint, fill: Fill) -> tuple:
    first = checkpoint[fill.sources[0]]
    return str(first.file), first.offset, fill.target


def _put(fill: Fill, checkpoint: Checkpoint, want: jax.ShapeDtypeStruct, place: Place | None, device: Any) -> jax.Array:
    sources = [checkpoint[name] for name in fill.sources]
    first = sources[0]
    if len(sources) == 1 and first.dtype == want.dtype and not fill.chain and not _is_host(device or jax.devices()[0]):
        placed = _place(place, fill.target, first.numpy(), device)
        first.release()
        if not any(_is_host(holder) for holder in placed.devices()):
            return placed
    # For the host, a buffer of our own: JAX on the CPU keeps an aligned numpy array as it is, and weights that alias a
    # file would change, or crash, with the file.
    out = aligned_empty(want.shape, want.dtype)
    if len(sources) == 1 and first.dtype == want.dtype and not fill.chain and first.read_into(out):
        return _place(place, fill.target, out, device)
    windows, steps = [out], fill.chain
    if steps and isinstance(steps[-1], Concat | Stack):
        steps, shapes = steps[:-1], [chain_shape(steps[:-1], [source.shape]) for source in sources]
        windows = fill.chain[-1].windows(out, shapes)
    for source, window in zip(sources, windows, strict=True):
        values = source.numpy()
        for step in steps:
            values = step(values)
        copy_cast(values, window)
        if want.dtype == np.float16 and source.dtype != np.float16 and not np.isfinite(window).all() and _all_finite(values):
            raise CheckpointError(
                f"tensor {source.name} of {source.file} has values beyond 65504, the largest float16; load it as bfloat16 or float32"
            )
        source.release()
    return _place(place, fill.target, out, device)


def _is_host(device: Any) -> bool:
    holders = device.device_set if isinstance(device, jax.sharding.Sharding) else (device,)
    return any(holder.platform == "cpu" for holder in holders)


def _all_finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values.astype(np.float32) if values.dtype.kind == "V" else values).all())


def _place(place: Place | None, path: str, array: np.ndarray, device: Any = None) -> jax.Array:
    placed = jax.device_put(array, device) if place is None or device is not None else array
    placed = placed if place is None else place(path, placed)
    # Waiting keeps one tensor in host memory; transfers of weights are bound by the bus, not by the queue.
    return jax.block_until_ready(placed)
