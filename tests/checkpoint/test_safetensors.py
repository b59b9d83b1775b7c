"""A safetensors file is read exactly as written, or refused in one line."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint import open_checkpoint
from jaxllm.checkpoint.safetensors import DTYPES
from jaxllm.errors import CheckpointError, UnsupportedError


def raw_file(path, header, data=b""):
    """`path`, written with this header (bytes, or a value to turn into JSON) and these tensor bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=4, shape=(1,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "F4"])
def test_every_dtype_keeps_its_bits(tmp_path, name):
    dtype = DTYPES[name]
    values = (np.arange(12, dtype=np.uint8) % 2).astype(dtype) if name == "BOOL" else np.arange(24 * dtype.itemsize, dtype=np.uint8).view(dtype)
    file = raw_file(tmp_path / "a.safetensors", {"x": entry(0, values.nbytes, [values.size], name)}, values.tobytes())
    with open_checkpoint(file) as checkpoint:
        read = checkpoint["x"].numpy()
        assert read.dtype == dtype and read.tobytes() == values.tobytes() and not read.flags.writeable


def test_f4_values_are_unpacked_low_half_first(tmp_path):
    file = raw_file(tmp_path / "a.safetensors", {"x": entry(0, 2, [2, 2], "F4")}, bytes([0x21, 0xF7]))
    with open_checkpoint(file) as checkpoint:
        assert checkpoint["x"].numpy().astype(np.float32).tolist() == [[0.5, 1.0], [6.0, -6.0]]


def test_the_reference_writer_and_this_reader_agree(tmp_path):
    rng = np.random.default_rng(0)
    saved = {
        "a": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.0, np.float32),
        "empty": np.zeros((0, 7), np.int8),
        "b": rng.integers(0, 9, (4, 2)),
    }
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.keys() == saved.keys() and checkpoint.container == "safetensors"
        assert checkpoint.total_bytes == sum(value.nbytes for value in saved.values())
        for name, value in saved.items():
            read = checkpoint[name].numpy()
            assert (read.shape, read.dtype) == (value.shape, value.dtype) == (checkpoint[name].shape, checkpoint[name].dtype)
            assert read.tobytes() == value.tobytes()


def test_values_are_views_of_the_map_and_outlive_the_checkpoint(tmp_path):
    save_file({"a": np.arange(1000.0)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint["a"]
        values = tensor.numpy()
        assert np.shares_memory(values, tensor.numpy())
        tensor.release()
    assert values.tolist() == list(range(1000))
    with pytest.raises(CheckpointError, match="was closed"):
        tensor.numpy()


def test_every_truncation_is_refused(tmp_path):
    save_file({"a": np.arange(5, dtype=np.int16), "b": np.ones(3, np.float32)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(cut)
        assert "\n" not in str(caught.value) and "cut.safetensors" in str(caught.value)


HOSTILE = {
    "two tensors overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"\0" * 6, "overlap"),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12, "gap"),
    "bytes nobody owns": ({"a": entry(0, 4)}, b"\0" * 8, "too long"),
    "more bytes than the file": ({"a": entry(0, 4096, [1024])}, b"\0" * 8, "truncated"),
    "offsets that lie": ({"a": entry(0, 4, [2])}, b"\0" * 4, "needs 8 bytes"),
    "offsets in the wrong order": ({"a": entry(4, 0)}, b"\0" * 4, "claims the bytes"),
    "negative offsets": ({"a": entry(-4, 0)}, b"\0" * 4, "claims the bytes"),
    "offsets that are not integers": ({"a": entry(0.0, 4)}, b"\0" * 4, "two integers"),
    "a negative size": ({"a": entry(0, 4, [-1])}, b"\0" * 4, "non-negative"),
    "a boolean size": ({"a": entry(0, 4, [True])}, b"\0" * 4, "non-negative"),
    "sizes that overflow": ({"a": entry(0, 0, [0, 1 << 62, 8])}, b"", "more bytes"),
    "too many dimensions": ({"a": entry(0, 4, [1] * 99)}, b"\0" * 4, "dimensions"),
    "an unknown dtype": ({"a": entry(0, 4, dtype="F31")}, b"\0" * 4, "F31"),
    "a dtype that is a list": ({"a": entry(0, 4, dtype=["F32"])}, b"\0" * 4, "dtype"),
    "an unknown field": ({"a": entry(0, 4, extra=1)}, b"\0" * 4, "exactly"),
    "a tensor that is a number": ({"a": 1}, b"", "exactly"),
    "the same name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
    "JSON cut short": (b'{"a":', b"", "damaged"),
    "not JSON": (b"[]", b"", "begin with"),
    "not UTF-8": (b'{"\xff":1}', b"", "damaged"),
    "nesting without end": (b'{"a":' + b"[" * 200_000, b"", "damaged"),
    "an integer without end": (b'{"a":' + b"9" * 100_000 + b"}", b"", "damaged"),
    "no tensors": ({}, b"", "no tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused(tmp_path, case):
    header, data, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(raw_file(tmp_path / "bad.safetensors", header, data))


def test_absurd_header_size_is_refused_without_reading_it(tmp_path):
    file = tmp_path / "bad.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(file)


def test_six_bit_floats_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedError, match="F6_E2M3"):
        open_checkpoint(raw_file(tmp_path / "a.safetensors", {"x": entry(0, 3, [4], "F6_E2M3")}, b"\0" * 3))
