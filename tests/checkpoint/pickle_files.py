"""Hand-made torch files for tests: zip and stream files around any pickle, honest or hostile."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


class Call:
    """Pickles as a call of the global `name` with `args`, without importing or calling anything."""

    def __init__(self, name, *args):
        self.name, self.args = name, args


class Global:
    def __init__(self, name):
        self.name = name


class Storage:
    """Pickles as a persistent id, as torch writes a storage."""

    def __init__(self, *saved):
        self.saved = saved


def tensor(key="0", numel=4, size=(4,), stride=(1,), offset=0, kind="Float", location="cpu"):
    """A tensor the way torch.save describes it."""
    return Call(
        "torch._utils._rebuild_tensor_v2",
        Storage("storage", Global(f"torch.{kind}Storage"), key, location, numel),
        offset,
        size,
        stride,
        False,
        OrderedDict(),
    )


class _Pickler(pickle._Pickler):  # the Python one: its save() can be overridden for every object
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            module, _, name = obj.name.rpartition(".")
            self.write(b"c" + module.encode() + b"\n" + name.encode() + b"\n")
        elif isinstance(obj, Call):
            self.save(Global(obj.name))
            self.save(obj.args)
            self.write(b"R")
        elif isinstance(obj, Storage):
            self.save(obj.saved)
            self.write(b"Q")
        else:
            super().save(obj, save_persistent_id)


def dumps(value, protocol=2):
    """The pickle of `value`, in which Call, Global and Storage are written as opcodes."""
    out = io.BytesIO()
    _Pickler(out, protocol).dump(value)
    return out.getvalue()


def zip_file(path, pickled, storages=None, extra=(), compression=zipfile.ZIP_STORED):
    """`path`, a torch zip file with this pickle (bytes or a value), these storages and further members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled if isinstance(pickled, bytes) else dumps(pickled))
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return path


def stream_file(path, pickled, storages=None, keys=None):
    """`path`, a torch stream file; storages {key: (count, bytes)}."""
    storages = storages or {}
    parts = [dumps(MAGIC_NUMBER), dumps(1001), dumps({"protocol_version": 1001, "little_endian": True})]
    parts += [pickled if isinstance(pickled, bytes) else dumps(pickled), dumps(list(storages) if keys is None else keys)]
    parts += [struct.pack("<q", count) + data for count, data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path
