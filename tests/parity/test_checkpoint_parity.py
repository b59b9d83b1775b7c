"""Live against torch: files it saves now give the bytes it reads, and files we write are read by it, bit for bit.

The oracle is a process of another environment, with torch and transformers: see conftest.py.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.checkpoint import Rule, open_checkpoint
from jaxllm.checkpoint.convert import convert
from jaxllm.checkpoint.load import load_params
from jaxllm.errors import CheckpointError, UnsupportedError, UsageError

ROOT = Path(__file__).parents[2]


def contents(path):
    with open_checkpoint(path) as checkpoint:
        return {name: [tensor.dtype.name, list(tensor.shape), tensor.numpy().tobytes().hex()] for name, tensor in checkpoint.items()}


@pytest.fixture(scope="module")
def goldens(oracle, tmp_path_factory):
    """The goldens of tests/data/pt, made anew by this oracle."""
    folder = tmp_path_factory.mktemp("goldens")
    oracle("../make_pt_goldens.py", folder)
    return folder


def test_goldens_made_now_are_read_as_torch_reads_them(goldens):
    for name, tensors in json.loads((goldens / "expected.json").read_text()).items():
        assert contents(goldens / name) == {key: [entry["dtype"], entry["shape"], entry["hex"]] for key, entry in tensors.items()}, name
    for file in (goldens / "refused").iterdir():
        with pytest.raises((CheckpointError, UnsupportedError)):
            open_checkpoint(file)


def test_the_committed_goldens_are_what_torch_says_today(goldens):
    committed = json.loads((ROOT / "tests/data/pt/expected.json").read_text())
    assert json.loads((goldens / "expected.json").read_text()) == committed


def test_random_state_dicts_are_read_as_torch_reads_them(oracle, tmp_path):
    for name, wanted in json.loads(oracle("checkpoint_random.py", tmp_path)).items():
        found = contents(tmp_path / name)
        assert {key.removeprefix("state_dict.").removeprefix("model.nested."): value for key, value in found.items()} == wanted, name


def test_models_that_we_convert_give_transformers_the_same_logits(oracle, goldens, tmp_path):
    folders = [goldens / "llama-safetensors"]
    for source in ("llama-safetensors", "llama-bin"):
        convert(goldens / source, tmp_path / source, max_shard_size="3KB")
        convert(goldens / source, tmp_path / f"{source}-npz", "npz")
        convert(tmp_path / f"{source}-npz", tmp_path / f"{source}-and-back")
        folders += [tmp_path / source, tmp_path / f"{source}-and-back"]
    report = json.loads(oracle("checkpoint_logits.py", *folders).splitlines()[-1])
    assert all(logits == report[str(folders[0])] for logits in report.values()) and len(report) == len(folders)


def test_map_location_succeeds_and_fails_where_torch_does(oracle, goldens):
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("the oracle's torch has no GPU and this JAX does")
    values = ["cpu", "cuda", "cuda:1", {"cuda:1": "cpu"}, {"cuda:1": "cpu", "cuda:0": "cpu"}, {"cuda:1": "cuda:0"}, {}, None]
    wanted = json.loads(oracle("checkpoint_map_location.py", goldens / "cuda.pt", json.dumps(values)))
    template = {"one": jax.ShapeDtypeStruct((2,), np.float32), "zero": jax.ShapeDtypeStruct((4,), np.float32)}
    found = []
    for value in values:
        try:
            with open_checkpoint(goldens / "cuda.pt") as checkpoint:
                load_params(checkpoint, (Rule("one", "one"), Rule("zero", "zero")), template, map_location=value)
            found.append("ok")
        except UsageError:
            found.append("error")
    assert found == wanted
