"""Names to lazy tensors, whatever the container: `open_checkpoint` is the only door that the rest of jaxllm uses.

    with open_checkpoint("path/to/model") as checkpoint:
        checkpoint["model.norm.weight"].numpy()
"""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxllm.checkpoint.layout import ADAPTER, Layout, find_layout, left_out, refuse_pointer
from jaxllm.checkpoint.mapped import LazyTensor, MappedFile, brief
from jaxllm.checkpoint.npz import read_npz
from jaxllm.checkpoint.orbax_tree import read_orbax
from jaxllm.checkpoint.safetensors import read_safetensors
from jaxllm.checkpoint.torch_legacy import read_torch_legacy
from jaxllm.checkpoint.torch_zip import read_torch_zip
from jaxllm.errors import CheckpointError

__all__ = ["Checkpoint", "LazyTensor", "open_checkpoint"]

log = logging.getLogger("jaxllm.checkpoint")

# Bytes of a tensor for each byte on the disk: deflate packs 1032 to 1, and a stride of zero or an absent zarr chunk needs none.
MOST_UNFOLDING = 2048


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of one checkpoint by name, in file order; a context manager that owns the memory maps."""

    def __init__(self, path: Path, layout: Layout, tensors: dict[str, LazyTensor], maps: tuple[MappedFile, ...]):
        self.path = path
        self.load_format = layout.load_format
        self.files = layout.files
        self.left_out = left_out(path, (*layout.files, *([layout.index_file] if layout.index_file else [])))
        self._tensors = tensors
        self._maps = maps

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def container(self) -> str:
        """The container of its files, joined by "+" in the odd folder that mixes two."""
        return "+".join(sorted({tensor.container for tensor in self._tensors.values()})) or self.load_format

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, those that share a storage counted each."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def close(self) -> None:
        """None; arrays already read stay valid, tensors not read yet cannot be read any more."""
        for mapped in self._maps:
            mapped.close()


def open_checkpoint(path: str | os.PathLike, load_format: str = "auto") -> Checkpoint:
    """The checkpoint at `path`, its headers checked and none of its data read.

    `path` is a folder in Hugging Face layout or one file. `load_format`: auto, safetensors, pt (.bin, .pt, .pth), npz
    or orbax; auto takes the names that transformers takes, in its order (model.safetensors, its index, pytorch_model.bin,
    its index), else the first of these formats that the folder holds. `left_out` names what else looks like weights. Raises
    CheckpointError for what is missing or damaged, UnsupportedError for what jaxllm does not read, each by name.
    """
    path = Path(path).expanduser()
    try:
        layout = find_layout(path, load_format)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from error
    if layout.load_format == "orbax":
        found = _some(read_orbax(path), path)
        _refuse_unfolding(found, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        return Checkpoint(path, layout, found, ())
    tensors: dict[str, LazyTensor] = {}
    maps: list[MappedFile] = []
    for file in layout.files:
        refuse_pointer(file)
        mapped = MappedFile(file)
        maps.append(mapped)
        found = _read_file(layout.load_format, mapped)
        if twice := next((name for name in found if name in tensors), None):
            raise CheckpointError(
                f"tensor {brief(twice)} is in {tensors[twice].file} and in {file}; one of them must go, or an index file must choose"
            )
        _refuse_unfolding(found, mapped.size)
        tensors.update(found)
    if layout.index_file is not None:
        _check_index(layout, tensors)
    checkpoint = Checkpoint(path, layout, _some(tensors, path), tuple(maps))
    if checkpoint.left_out:
        adapted = [name for name in checkpoint.left_out if ADAPTER.fullmatch(name)]
        log.log(logging.WARNING if adapted else logging.INFO, "%s: left out: %s%s", path, ", ".join(checkpoint.left_out),
                "; an adapter is not applied, merge it first if it is wanted" if adapted else "")
    return checkpoint


def _refuse_unfolding(tensors: dict[str, LazyTensor], stored: int) -> None:
    for name, tensor in tensors.items():
        if tensor.nbytes > MOST_UNFOLDING * max(stored, 4096):
            raise CheckpointError(
                f"{tensor.file}: tensor {brief(name)} unfolds {stored} bytes to {tensor.nbytes}, more than {MOST_UNFOLDING} for each; refused"
            )


def _some(tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give a file or folder with weights")
    return tensors


def _read_file(load_format: str, mapped: MappedFile) -> dict[str, LazyTensor]:
    if load_format == "safetensors":
        return read_safetensors(mapped)
    head = mapped.view(0, 4).tobytes()
    if load_format == "npz":
        if head != b"PK\x03\x04":
            raise CheckpointError(f"{mapped.path} is not an npz file: it does not begin as a zip file does; fetch it again")
        return read_npz(mapped)
    if head == b"PK\x03\x04":
        return read_torch_zip(mapped)
    if head[:1] in (b"\x80", b"L") or mapped.view(257, 5).tobytes() == b"ustar":
        return read_torch_legacy(mapped)
    raise CheckpointError(f"{mapped.path} is not a torch file: it begins neither as a zip file nor as a pickle; fetch it again")


def _check_index(layout: Layout, tensors: dict[str, LazyTensor]) -> None:
    for name, shard in layout.weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            where = f"in {tensors[name].file.name}" if name in tensors else "in none of the shards"
            raise CheckpointError(
                f"{layout.index_file} places tensor {brief(name)} in {shard}, and it is {where}; the index and the shards do not belong together"
            )
    unlisted = [name for name in tensors if name not in layout.weight_map]
    if unlisted:
        log.info("%s: %d tensors are in the shards and not in the index, the first is %s", layout.index_file, len(unlisted), unlisted[0])
