"""Which device each storage of a checkpoint lands on: torch.load's map_location, in terms of JAX devices.

A storage whose location maps to "cpu" is read into host memory, and goes from there to where the model's parameters
live. One that maps to "cuda:1" goes straight to that GPU. `cuda` and `gpu` are two names for JAX's gpu platform.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxllm.checkpoint.mapped import LazyTensor, brief
from jaxllm.errors import UsageError

# A name for all, names for some, a function of (tensor, saved location), or None: everything where it was saved.
type MapLocation = str | Mapping[str, str] | Callable[[LazyTensor, str], Any] | None

PARAM = "pt_load_map_location"


def parse_map_location(text: str) -> str | dict[str, str]:
    """The value of --pt-load-map-location: a device name, or a JSON object of saved names to devices."""
    if not text.lstrip().startswith(("{", "[", '"')):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{PARAM} {brief(text)} is not JSON ({error}); write it as \'{{"cuda:1": "cuda:0"}}\', or give one device', PARAM) from error
    check_map_location(value)
    return value


def check_map_location(value: object) -> None:
    """None; UsageError if `value` is nothing that map_location may be."""
    if value is None or isinstance(value, str) or callable(value):
        return
    if isinstance(value, Mapping) and all(isinstance(key, str) and isinstance(target, str) for key, target in value.items()):
        return
    raise UsageError(
        f"{PARAM} is {brief(value)}; allowed are a device such as cpu, cuda or cuda:1, a mapping of saved to wanted devices "
        'such as {"cuda:1": "cuda:0"} or {"": "cuda"}, and in Python a function (tensor, location) -> device',
        PARAM,
    )


def device_for(tensor: LazyTensor, map_location: MapLocation) -> jax.Device | jax.sharding.Sharding | None:
    """The device where the tensor's storage lands; None is host memory. UsageError lists the devices there are.

    As in torch.load, a mapping leaves locations that it does not name where they were saved, and a function that
    returns None does too; "" in a mapping names all others. A function may return a device name, a JAX device or
    sharding, or the tensor itself, which leaves it in host memory (torch's idiom `lambda storage, location: storage`).
    """
    saved = tensor.location
    if map_location is None:
        target = saved
    elif isinstance(map_location, str):
        target = map_location
    elif isinstance(map_location, Mapping):
        target = map_location.get(saved, map_location.get("", saved))
    else:
        target = map_location(tensor, saved)
        target = saved if target is None else target
    if target is tensor or target == "cpu":
        return None
    if isinstance(target, jax.Device | jax.sharding.Sharding):
        return target
    if isinstance(target, str):
        return _named_device(target, tensor)
    raise UsageError(
        f"{PARAM} returned {brief(target)} for {tensor.name}; allowed are None, a device name, a jax.Device, a jax.sharding.Sharding, "
        "and the tensor itself",
        PARAM,
    )


def _named_device(name: str, tensor: LazyTensor) -> jax.Device | None:
    platform, colon, index = name.partition(":")
    platform = "gpu" if platform == "cuda" else platform
    known = [device for device in jax.devices() if device.platform == platform]
    if platform == "cpu" and (not colon or index == "0"):
        return None
    number = int(index) if index.isascii() and index.isdigit() and len(index) < 6 else 0 if not colon else -1
    if not 0 <= number < len(known):
        there = ", ".join(_title(device, position) for position, device in _numbered(jax.devices()))
        raise UsageError(
            f"{PARAM} puts {tensor.name} (saved on {tensor.location}) on {brief(name)}, and the devices here are cpu"
            + (f", {there}" if there else "")
            + "; give one of these",
            PARAM,
        )
    return known[number]


def _numbered(devices: list[jax.Device]) -> list[tuple[int, jax.Device]]:
    seen: dict[str, int] = {}
    numbered = []
    for device in devices:
        if device.platform != "cpu":
            numbered.append((seen.get(device.platform, 0), device))
            seen[device.platform] = seen.get(device.platform, 0) + 1
    return numbered


def _title(device: jax.Device, position: int) -> str:
    return f"{'cuda' if device.platform == 'gpu' else device.platform}:{position}"
