"""pt_load_map_location means what torch.load's map_location means, on the devices that JAX has."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.checkpoint import Rule, open_checkpoint
from jaxllm.checkpoint.load import load_params
from jaxllm.checkpoint.map_location import parse_map_location
from jaxllm.errors import UsageError

DATA = Path(__file__).parents[1] / "data/pt"
RULES = (Rule("one", "one"), Rule("zero", "zero"))  # `one` was saved on cuda:1, `zero` on cuda:0
TEMPLATE = {"one": jax.ShapeDtypeStruct((2,), np.float32), "zero": jax.ShapeDtypeStruct((4,), np.float32)}
CPU = jax.devices("cpu")[0]
HAS_GPU = any(device.platform == "gpu" for device in jax.devices())


def load(map_location, **options):
    with open_checkpoint(DATA / "cuda.pt") as checkpoint:
        return load_params(checkpoint, RULES, TEMPLATE, map_location=map_location, **options)


def check(params):
    assert params["one"].tolist() == [0, 1] and params["zero"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "map_location",
    [
        "cpu",
        "cpu:0",
        {"cuda:0": "cpu", "cuda:1": "cpu"},
        {"": "cpu"},
        {"cuda:1": "cpu", "": "cpu"},
        lambda tensor, location: tensor,
        lambda tensor, location: "cpu",
        lambda tensor, location: CPU,
        lambda tensor, location: jax.sharding.SingleDeviceSharding(CPU),
    ],
)
def test_a_checkpoint_of_two_gpus_loads_on_the_host(map_location):
    check(load(map_location))


def test_the_default_is_the_host():
    with open_checkpoint(DATA / "cuda-legacy.pt") as checkpoint:
        check(load_params(checkpoint, RULES, TEMPLATE))


@pytest.mark.skipif(HAS_GPU, reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("map_location", "wanted"),
    [
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        ({"": "cuda"}, "cuda"),
        ({"cuda:1": "cpu"}, "cuda:0"),  # a mapping leaves what it does not name where it was saved
        ({"cuda:1": "cuda:0"}, "cuda:0"),
        (None, "cuda:"),
        (lambda tensor, location: None, "cuda:"),
        ("mps", "mps"),
        ("cpu:7", "cpu:7"),
        ("cuda:x", "cuda:x"),
        ("", ""),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(map_location, wanted):
    placed = []
    with pytest.raises(UsageError, match=rf"on '{wanted}.*the devices here are cpu") as caught:
        load(map_location, place=lambda path, array: placed.append(path))
    assert caught.value.param == "pt_load_map_location" and placed == [] and "saved on cuda:" in str(caught.value)


def test_a_callable_gets_each_tensor_and_its_saved_location():
    seen = {}
    load(lambda tensor, location: seen.setdefault(tensor.name, location) and "cpu")
    assert seen == {"one": "cuda:1", "zero": "cuda:0"}


def test_place_gets_what_map_location_placed():
    kinds = {}

    def place(path, array):
        kinds[path] = type(array)
        return jax.device_put(array, CPU)

    check(load(lambda tensor, location: CPU if location == "cuda:1" else "cpu", place=place))
    assert kinds["zero"] is np.ndarray and issubclass(kinds["one"], jax.Array)


@pytest.mark.parametrize("value", [7, ["cuda"], {"cuda:1": 0}, {1: "cpu"}])
def test_what_is_no_map_location_is_refused(value):
    with pytest.raises(UsageError, match="allowed are"):
        load(value)


def test_a_callable_that_returns_nonsense_is_refused():
    with pytest.raises(UsageError, match="returned 7 for"):
        load(lambda tensor, location: 7)


def test_the_command_line_form_is_a_device_or_json():
    assert parse_map_location("cuda:1") == "cuda:1"
    assert parse_map_location('{"cuda:1": "cuda:0"}') == {"cuda:1": "cuda:0"}
    for text in ("{'cuda:1': 'cuda:0'}", '{"cuda:1": 0}', '{"a"', "[1]"):
        with pytest.raises(UsageError, match="pt_load_map_location"):
            parse_map_location(text)
