"""Arrays of npz files are read as numpy reads them, without a copy where they are stored plainly."""

import io
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxllm.checkpoint import npz, open_checkpoint
from jaxllm.checkpoint.zipmap import member_bytes
from jaxllm.errors import CheckpointError, UnsupportedError


def arrays():
    rng = np.random.default_rng(0)
    return {
        "f": rng.normal(size=(3, 4)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32)),
        "big": rng.integers(0, 99, 5).astype(">i4"),
        "scalar": np.array(7, np.int8),
        "empty": np.zeros((0, 3), np.uint16),
        "c": np.ones(2, np.complex64),
        "flag": np.array([True, False]),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_is_as_numpy_reads_it(tmp_path, save):
    save(tmp_path / "a.npz", **arrays())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.keys() == arrays().keys() and checkpoint.container == "npz"
        for name, value in arrays().items():
            read = checkpoint[name].numpy()
            assert (read.shape, read.dtype) == (value.shape, value.dtype.newbyteorder("=")) == (checkpoint[name].shape, checkpoint[name].dtype)
            assert np.array_equal(read, value)


def test_stored_arrays_are_views_of_the_map(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    with open_checkpoint(tmp_path) as checkpoint:
        assert np.shares_memory(checkpoint["f"].numpy(), checkpoint["f"].numpy())


def test_every_truncation_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(5), b=np.ones(3, np.float32))
    for length in reversed(range((tmp_path / "a.npz").stat().st_size)):
        os.truncate(tmp_path / "a.npz", length)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "a.npz")


def test_objects_and_nameless_types_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    with pytest.raises(UnsupportedError, match="object"):
        open_checkpoint(tmp_path)
    np.savez(tmp_path / "a.npz", a=np.ones(2, ml_dtypes.bfloat16))
    with pytest.raises(UnsupportedError, match="bfloat16"):
        open_checkpoint(tmp_path)


def npy(header: bytes, data: bytes = b"", version=b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"not an array", "damaged header"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", b"\0" * 8), "12 bytes, and 8"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }", b"\0" * 8), "non-negative"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }", b"\0" * 4), "non-negative"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4611686018427387904, 99), }"), "more bytes"),
        (npy(b"__import__('os').system('true')"), "damaged header"),
        (npy(b"(" * 9000), "damaged header"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\0" * 4, b"\x09\x00"), "version"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, content, match):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path)


def test_members_that_are_no_arrays_and_false_dtypes_are_refused(tmp_path):
    out = io.BytesIO()
    np.save(out, np.ones(2, np.float32))
    for name, content, match in (
        ("readme.txt", b"hello", "no .npy"),
        ("__dtypes__.npy", npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (18,), }", b'{"a": "float128"} '), "__dtypes__"),
        ("__dtypes__.npy", npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (17,), }", b'{"a": "bfloat16"}'), "said to be"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("a.npy", out.getvalue())
            archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(tmp_path)


def test_a_compressed_member_is_not_inflated_to_read_its_header_nor_far_beyond_the_file_to_read_names(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(1 << 22, np.float32))
    inflated = []
    monkeypatch.setattr(npz, "member_bytes", lambda *args: inflated.append(args) or member_bytes(*args))
    with open_checkpoint(tmp_path / "zeros.npz") as checkpoint:
        assert inflated == [] and not checkpoint["a"].numpy().any() and len(inflated) == 1
    names = np.frombuffer(b"{" + b" " * (4 << 20) + b"}", np.uint8)
    np.savez_compressed(tmp_path / "names.npz", a=np.zeros(4, np.uint16), **{npz.DTYPES_MEMBER: names})
    with pytest.raises(CheckpointError, match="more than 8 times the file"):
        open_checkpoint(tmp_path / "names.npz")
