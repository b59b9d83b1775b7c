"""Files that torch saved give the bytes that torch reads; hostile files are refused by name and nothing is executed."""

import json
import logging
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pickle_files import Call, Global, Storage, dumps, stream_file, tensor, zip_file

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, UnsupportedError

DATA = Path(__file__).parents[1] / "data/pt"
EXPECTED = json.loads((DATA / "expected.json").read_text())
FLOATS = np.arange(4, dtype=np.float32)


def refused(file, match, kind=CheckpointError):
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(file)
    assert "\n" not in str(caught.value) and file.name in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", EXPECTED)
def test_every_tensor_has_the_bytes_that_torch_reads(name):
    with open_checkpoint(DATA / name) as checkpoint:
        read = {key: (str(lazy.dtype), list(lazy.shape), lazy.numpy().tobytes().hex()) for key, lazy in checkpoint.items()}
        assert all(lazy.numpy().dtype == lazy.dtype and not lazy.numpy().flags.writeable for lazy in checkpoint.values())
    assert read == {key: (entry["dtype"], entry["shape"], entry["hex"]) for key, entry in EXPECTED[name].items()}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("tied")])
def test_tied_tensors_are_kept_shared(name):
    with open_checkpoint(DATA / name) as checkpoint:
        embed, head = checkpoint["embed.weight"], checkpoint["lm_head.weight"]
        assert embed.identity == head.identity and np.shares_memory(embed.numpy(), head.numpy())


@pytest.mark.parametrize("name", ["views.pt", "views-legacy.pt"])
def test_views_of_one_storage_share_the_map(name):
    with open_checkpoint(DATA / name) as checkpoint:
        base = checkpoint["base"].numpy()
        for other in ("transposed", "strided", "rows", "expanded", "scalar_of_base"):
            assert checkpoint[other].storage == checkpoint["base"].storage
            assert np.shares_memory(base, checkpoint[other].numpy())


def test_saved_locations_are_kept():
    for name in ("cuda.pt", "cuda-legacy.pt"):
        with open_checkpoint(DATA / name) as checkpoint:
            assert {key: lazy.location for key, lazy in checkpoint.items()} == {"one": "cuda:1", "zero": "cuda:0"}


def test_what_is_no_tensor_is_left_out_and_named(caplog):
    with caplog.at_level(logging.INFO, "jaxllm.checkpoint"):
        open_checkpoint(DATA / "nested.pt").close()
    assert "epoch" in caplog.text and "no tensors" in caplog.text


def test_sharded_bin_and_safetensors_of_one_model_are_equal():
    with open_checkpoint(DATA / "llama-bin") as torch_files, open_checkpoint(DATA / "llama-safetensors") as safetensors:
        assert torch_files.container == "pt-zip" and len(torch_files.files) == 2
        assert set(torch_files) - set(safetensors) == {"lm_head.weight"}  # tied: safetensors leave it out
        for name, lazy in safetensors.items():
            assert torch_files[name].dtype == lazy.dtype and torch_files[name].numpy().tobytes() == lazy.numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("quantised.pt", UnsupportedError, "_rebuild_qtensor: a quantised tensor"),
        ("sparse.pt", UnsupportedError, "sparse"),
        ("complex32.pt", UnsupportedError, "complex32"),
        ("torchscript.pt", UnsupportedError, "TorchScript"),
        ("conjugate.pt", CheckpointError, "resolve_conj"),
        ("module.pt", CheckpointError, r"torch\.nn\.modules\.linear\.Linear"),
        ("namespace.pt", CheckpointError, r"argparse\.Namespace"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, kind, match):
    refused(DATA / "refused" / name, match, kind)


@pytest.mark.parametrize("name", ["tied.pt", "tied-legacy.pt", "views-deflated.pt"])
def test_every_truncation_is_refused(tmp_path, name):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((DATA / name).read_bytes())
    for length in reversed(range(cut.stat().st_size)):
        os.truncate(cut, length)
        with pytest.raises(CheckpointError):
            open_checkpoint(cut)


@pytest.mark.parametrize("name", ["tied.pt", "tied-legacy.pt", "views-deflated.pt", "dtypes.pt", "nested-legacy.pt", "tied-protocol4.pt"])
def test_damage_ends_in_our_errors_or_in_a_readable_checkpoint(tmp_path, name):
    whole, walk = (DATA / name).read_bytes(), random.Random(5)
    file = tmp_path / "damaged.pt"
    for step in range(400):
        data = bytearray(whole)
        for _ in range(walk.choice((1, 1, 2, 8))):
            data[walk.randrange(len(data))] = walk.choice((0, 1, 0x2E, 0x7F, 0x80, 0xFF, walk.randrange(256)))
        file.write_bytes(data)
        try:
            with open_checkpoint(file) as checkpoint:
                for lazy in checkpoint.values():
                    if lazy.nbytes < 1 << 20:  # a damaged size over a zero stride may be large, and is not wrong
                        lazy.numpy().tobytes()
        except (CheckpointError, UnsupportedError):
            pass
        except Exception as error:
            raise AssertionError(f"step {step} of seed 5 on {name}") from error


class Evil:
    """Pickles as a call of `function`, which must never happen."""

    def __init__(self, function, *args):
        self.made = (function, args)

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [zip_file, stream_file])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path, protocol, write):
    witness = tmp_path / "witness"
    for function, args, name in (
        (os.system, (f"touch {witness}",), r"(posix|nt)\.system"),
        (eval, (f"open({str(witness)!r}, 'w')",), r"builtins\.eval"),
        (exec, (f"open({str(witness)!r}, 'w')",), r"builtins\.exec"),
        (open, (str(witness), "w"), r"io\.open"),
        (getattr, (str, "upper"), r"builtins\.getattr"),
    ):
        payload = pickle.dumps({"weight": Evil(function, *args)}, protocol).replace(b"__builtin__", b"builtins")
        refused(write(tmp_path / "evil.bin", payload), name)
    assert not witness.exists()


HOSTILE_PICKLES = {
    "an unknown torch class": (Call("torch.hub.load", "x"), r"torch\.hub\.load"),
    "a name like an allowed one": (Call("torch._utils._rebuild_tensor_v2.__globals__", 1), "__globals__"),
    "a reduce on a dtype": (dumps(Global("torch.float32"))[:-1] + b")R.", "not a function of the list"),
    "a reduce on text": (b"\x80\x02X\x01\x00\x00\x00a)R.", "not a function of the list"),
    "an object of a class": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode 0x81"),
    "an instance": (b"(ios\nsystem\n.", "opcode 0x69"),
    "an extension code": (b"\x80\x02\x82\x01.", "opcode 0x82"),
    "state set on a tensor": (dumps(tensor())[:-1] + b"}b.", "sets the state"),
    "too few arguments": (Call("torch._utils._rebuild_tensor_v2", 1), "does not take"),
    "a storage that is text": (Call("torch._utils._rebuild_tensor_v2", "x", 0, (1,), (1,), False, None), "storage is no storage"),
    "a dtype that is text": (
        Call("torch._utils._rebuild_tensor_v3", Storage("storage", Global("torch.UntypedStorage"), "0", "cpu", 16), 0, (1,), (1,), False, None, "f"),
        "dtype",
    ),
    "a module as storage": (Storage("module", "x", "y", "z"), "module"),
    "a storage without a type": (Storage("storage", "torch.FloatStorage", "0", "cpu", 4), "storage"),
    "a storage of negative size": (tensor(numel=-4), "storage"),
    "a storage that is not there": (tensor(key="9"), "'9'"),
    "a storage key that is a path": (tensor(key="../../etc/passwd"), "not in the file"),
    "a storage of another size": (tensor(numel=3), "should have 12 bytes"),
    "a shape past its storage": (tensor(size=(5,)), "reaches byte 20"),
    "strides past the storage": (tensor(size=(2,), stride=(4,)), "reaches byte 20"),
    "an offset past the storage": (tensor(size=(1,), offset=4), "reaches byte 20"),
    "a negative offset": (tensor(size=(1,), offset=-1), "begins at element"),
    "a negative stride": (tensor(stride=(-1,)), "strides"),
    "fewer strides than sizes": (tensor(stride=()), "strides"),
    "a negative size": (tensor(size=(-4,)), "non-negative"),
    "a size that overflows": (tensor(size=(1 << 40, 1 << 40), stride=(0, 0)), "more bytes than any file"),
    "a size that is text": (tensor(size=("4",)), "shape"),
    "too many dimensions": (tensor(size=(1,) * 40, stride=(1,) * 40), "40 dimensions"),
    "two names that meet": ({"a.b": tensor(), "a": {"b": tensor()}}, "two tensors named"),
    "nothing but numbers": ({"a": 1}, "no tensors"),
    "a huge memo index": (b"\x80\x02Nr\xff\xff\xff\x7f.", "no tensors"),
    "a memo never set": (b"\x80\x02h\x07.", "damaged pickle"),
    "a huge string": (b"\x80\x02\x8d" + struct.pack("<Q", 1 << 62), "truncated"),
    "a huge integer": (b"\x80\x02\x8b" + struct.pack("<l", 1 << 30) + b"9" * 64, "integer of"),
    "an endless decimal": (b"L" + b"9" * 100_000 + b"\n.", "name of more than"),
    "an empty stack": (b"\x80\x02R.", "damaged pickle"),
    "a mark as value": (b"\x80\x02(.", "damaged pickle"),
    "a tuple of 65 parts as key": (b"\x80\x02}(" + b"N" * 64 + b"tNs.", "dict key"),
    "a list in a tuple as key": (b"\x80\x02}]\x85Ns.", "dict key"),
    "a set as key": (b"\x80\x02}\x8fNs.", "dict key"),
    "items added to a list": (b"\x80\x02](\x90.", "items are added"),
    "an encoding that is none of bytes": (Call("_codecs.encode", "a", "rot13"), "latin1"),
    "a complex number of text": (Call("builtins.complex", "1"), "two numbers"),
    "items in a list": (b"\x80\x02]NNs.", "items are set"),
    "items appended to a dict": (b"\x80\x02}Na.", "appended"),
    "text that is no text": (b"\x80\x02X\x01\x00\x00\x00\xff.", "damaged pickle"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "deep"),
    "a name without end": ({"x" * 2000: tensor()}, "name of more than"),
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickle_is_refused(tmp_path, case):
    pickled, match = HOSTILE_PICKLES[case]
    refused(zip_file(tmp_path / "bad.pt", pickled, {"0": FLOATS.tobytes()}), match, (CheckpointError, UnsupportedError))


def test_a_tree_of_two_to_the_sixty_leaves_ends_in_bounded_time(tmp_path):
    # thirty lists, each holding the one before four times over: 4**30 leaves from 450 bytes
    layers = b"".join(b"](h\x00h\x00h\x00h\x00eq\x000" for _ in range(30))
    refused(zip_file(tmp_path / "bomb.pt", b"\x80\x02]q\x000" + layers + b"h\x00."), "entries")


def test_a_hash_bomb_of_shared_tuples_is_refused(tmp_path):
    layers = b"".join(b"h\x00h\x00\x86q\x000" for _ in range(100))
    refused(zip_file(tmp_path / "bomb.pt", b"\x80\x02})q\x000" + layers + b"h\x00Ns."), "dict key")


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    refused(zip_file(tmp_path / "loop.pt", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."), "deep")


# A value is named again by two bytes, and what is made of it may take any number: 448 kB of the first reached 5.7 GB.
AMPLIFIERS = {
    "a list copied by each call": b"\x80\x02ctorch\nSize\nq\x00](" + b"K\x01" * 50_000 + b"eq\x01]q\x02" + b"h\x00h\x01\x85Ra" * 50_000 + b".",
    "pairs copied by each call": b"\x80\x02ccollections\nOrderedDict\nq\x00](" + b"".join(
        b"M" + struct.pack("<H", i) + b"N\x86" for i in range(30_000)) + b"eq\x01]q\x02" + b"h\x00h\x01\x85Ra" * 30_000 + b".",
    "text encoded by each call": b"\x80\x02c_codecs\nencode\nq\x00X" + struct.pack("<L", 200_000) + b"a" * 200_000 + b"q\x01]q\x02"
    + b"h\x00h\x01\x85Ra" * 50_000 + b".",
    "remembered empty lists": b"\x80\x04" + b"]\x94" * 400_000 + b".",
    "empty dicts": b"\x80\x04" + b"}" * 800_000 + b".",
    "a list that holds itself first": b"\x80\x02]q\x00(h\x00" + b"N" * 400_000 + b"e.",
    # dict 200 + level holds the one before under eight names: 8**6 names of the one tensor
    "one tensor under many names": dumps({"t": tensor()})[:-1] + b"q\xff" + b"".join(
        b"}q" + bytes([200 + level]) + b"(" + b"".join(b"X\x01\0\0\0" + bytes([97 + i, 104, 199 + level if level else 255]) for i in range(8)) + b"u"
        for level in range(6)) + b"q\x01" + b"0" * 6 + b"h\x01.",
}

MEASURE = """
import sys
from jaxllm.checkpoint import open_checkpoint
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
try:
    open_checkpoint(sys.argv[1])
    print("read", end=" ")
except Exception as error:
    print(type(error).__name__, end=" ")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("case", AMPLIFIERS)
def test_a_pickle_takes_memory_in_proportion_to_its_bytes(tmp_path, case):
    file = zip_file(tmp_path / "bomb.pt", AMPLIFIERS[case], {"0": FLOATS.tobytes()})
    done = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, taken = done.stdout.split()
    assert outcome == "CheckpointError" and int(taken) < (64 << 20) + 150 * file.stat().st_size


def test_a_pickle_that_deflate_made_small_is_refused(tmp_path):
    refused(zip_file(tmp_path / "bomb.pt", b"\x80\x02" + b"]0" * (4 << 20) + b"N.", compression=zipfile.ZIP_DEFLATED), "unfolds to")


def test_a_tensor_of_more_bytes_than_any_packing_gives_is_refused(tmp_path):
    refused(zip_file(tmp_path / "wide.pt", {"a": tensor(size=(1 << 40,), stride=(0,))}, {"0": FLOATS.tobytes()}), "unfolds")


def test_values_that_torch_allows_beside_the_weights_are_read_and_left_out(tmp_path):
    """What torch.load reads with weights_only=True: tuple keys, set, complex, bytearray, bytes, Counter, at every protocol."""
    beside = {(1, "a"): 2, "set": {1, (2, 3)}, "frozen": frozenset([1]), "complex": 2j, "bytearray": bytearray(b"\xff\0"), "bytes": b"\xff\0a",
              "counter": Counter("abca"), b"key": None, ("t", (1, None)): [1.5]}
    for protocol in (2, 3, 4, 5):
        file = zip_file(tmp_path / f"{protocol}.pt", dumps({"w": tensor(), "beside": beside, ("k", 0): tensor()}, protocol), {"0": FLOATS.tobytes()})
        with open_checkpoint(file) as checkpoint:
            assert {name: lazy.numpy().tolist() for name, lazy in checkpoint.items()} == {"w": [0, 1, 2, 3], "(k, 0)": [0, 1, 2, 3]}


HOSTILE_STREAMS = {
    "another magic number": (dumps(7), "not one that torch.save wrote"),
    "a global before the magic number": (b"\x80\x02cos\nsystem\n.", r"os\.system"),
    "another version": (dumps(0x1950A86A20F9469CFC6C) + dumps(1002), "protocol version 1002"),
}


@pytest.mark.parametrize("case", HOSTILE_STREAMS)
def test_hostile_stream_header_is_refused(tmp_path, case):
    data, match = HOSTILE_STREAMS[case]
    file = tmp_path / "bad.pt"
    file.write_bytes(data)
    refused(file, match, (CheckpointError, UnsupportedError))


@pytest.mark.parametrize(
    ("storages", "keys", "match"),
    [
        ({"0": (1 << 60, b"")}, None, "truncated"),
        ({"0": (-1, b"")}, None, "claims -1"),
        ({"0": (3, b"\0" * 12)}, None, "reaches byte 16"),
        ({"0": (4, b"\0" * 16), "1": (0, b"")}, None, "none of its tensors"),
        ({}, None, "are not in the file"),
        ({"0": (4, b"\0" * 16)}, ["0", "0"], "damaged list"),
        ({"0": (4, b"\0" * 16)}, {"0": 1}, "damaged list"),
    ],
)
def test_stream_storages_that_lie_are_refused(tmp_path, storages, keys, match):
    refused(stream_file(tmp_path / "bad.pt", {"a": tensor()}, storages, keys), match)


def test_a_stream_file_with_views_of_storages_reads_them(tmp_path):
    storage = Storage("storage", Global("torch.FloatStorage"), "7", "cpu", 8, ("8", 2, 4))
    call = Call("torch._utils._rebuild_tensor", storage, 1, (3,), (1,))
    file = stream_file(tmp_path / "old.pt", {"a": call}, {"7": (8, np.arange(8, dtype=np.float32).tobytes())})
    with open_checkpoint(file) as checkpoint:
        assert checkpoint["a"].numpy().tolist() == [3, 4, 5]


def test_tar_files_of_the_first_torch_are_refused_by_name(tmp_path):
    import tarfile

    file = tmp_path / "first.pt"
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(__file__, "storages")
    refused(file, "tar", UnsupportedError)


def edited(path, old, new, count=1):
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, count))
    return path


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "C:/x", "a\\b"])
def test_zip_slip_names_are_refused(tmp_path, name):
    refused(zip_file(tmp_path / "slip.pt", {"a": tensor()}, {"0": FLOATS.tobytes()}, [(name, b"x")]), "outside the archive")


def test_duplicate_members_are_refused(tmp_path):
    file = zip_file(tmp_path / "twice.pt", {"a": tensor()}, {"0": FLOATS.tobytes(), "1": FLOATS.tobytes()})
    refused(edited(file, b"archive/data/1", b"archive/data/0", 2), "there twice")


def test_a_member_named_otherwise_in_its_own_header_is_refused(tmp_path):
    file = zip_file(tmp_path / "two_faced.pt", {"a": tensor()}, {"0": FLOATS.tobytes()})
    refused(edited(file, b"archive/data/0", b"archive/data/X"), "says other")


def directory_edit(path, member, offset, fmt, value):
    """`path` with one field of the member's directory entry replaced."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(member.encode()))
    struct.pack_into(fmt, data, at + offset, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "match"),
    [
        (24, "<L", 1 << 30, "claims"),  # unpacked size
        (20, "<L", 1 << 30, "stored as"),  # packed size
        (42, "<L", 0, "says other"),  # where its header lies: that of another member
        (42, "<L", 1 << 30, "outside the file"),
        (42, "<L", 0xFFFFFFFF, "64-bit"),
        (10, "<H", 12, "compressed by method 12"),
        (8, "<H", 1, "encrypted"),
        (28, "<H", 60_000, "no entry"),  # name length
    ],
)
def test_members_that_lie_are_refused(tmp_path, offset, fmt, value, match):
    file = zip_file(tmp_path / "liar.pt", {"a": tensor()}, {"0": FLOATS.tobytes()})
    refused(directory_edit(file, "archive/data/0", offset, fmt, value), match, (CheckpointError, UnsupportedError))


def test_a_deflated_member_cannot_unfold_beyond_what_it_claims(tmp_path):
    file = zip_file(tmp_path / "bomb.pt", {"a": tensor(numel=1 << 18, size=(4,))}, {"0": b"\0" * (1 << 20)}, compression=zipfile.ZIP_DEFLATED)
    directory_edit(file, "archive/data/0", 24, "<L", 16)
    refused(file, "should have")
    file = zip_file(tmp_path / "bomb2.pt", b"\x80\x02" + b"N0" * (1 << 20) + b"N.", compression=zipfile.ZIP_DEFLATED)
    refused(directory_edit(file, "archive/data.pkl", 24, "<L", 100), "unfold")
    refused(directory_edit(file, "archive/data.pkl", 24, "<L", 0x7FFFFFFF), "claims that")


@pytest.mark.parametrize(("extra", "match"), [([("x/data.pkl", b"N.")], "2 data.pkl"), ([("archive/code/a.py", b"")], "TorchScript"), ([("archive/byteorder", b"middle")], "byte order")])
def test_zip_files_that_are_no_state_dicts_are_refused(tmp_path, extra, match):
    refused(zip_file(tmp_path / "bad.pt", {"a": tensor()}, {"0": FLOATS.tobytes()}, extra), match, (CheckpointError, UnsupportedError))


def test_a_file_that_is_nothing_is_refused(tmp_path):
    file = tmp_path / "hello.bin"
    file.write_bytes(b"hello, world")
    refused(file, "neither as a zip file nor as a pickle")
