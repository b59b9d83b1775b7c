"""Which files of a folder hold the weights: the Hugging Face layout, its index files, and what a half-copied one lacks."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from jaxllm.checkpoint.mapped import brief
from jaxllm.errors import CheckpointError, UnsupportedError, UsageError

LOAD_FORMATS = ("auto", "safetensors", "pt", "npz", "orbax")

# In the order that `auto` prefers them; `pt` is one format with three endings, and `.bin` is what transformers writes.
PATTERNS = MappingProxyType(
    {
        "safetensors": ("*.safetensors",),
        "pt": ("*.bin", "*.pt", "*.pth"),
        "npz": ("*.npz",),
    }
)
# The names that transformers looks for, in its order; each may be one file or, with .index.json behind it, the index of several.
CANONICAL = (("safetensors", "model.safetensors"), ("pt", "pytorch_model.bin"))
# Weights of any framework, and their indexes.
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|npz|h5|msgpack|onnx|gguf|ot|ckpt)(\.index\.json)?")
ADAPTERS = r"adapter_model|adapter|pytorch_lora_weights|non_lora_trainables"
# Files that trainers leave beside the weights; they end like weights and are none.
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|lr_scheduler|scaler|rng_state|random_states|trainer_state|value_head|v_head|" + ADAPTERS
    + r")([._-].*)?\.(bin|pt|pth|npz|safetensors)"
)
ADAPTER = re.compile(rf"({ADAPTERS})\.(bin|pt|safetensors)")
# The same weights in another precision, as transformers and diffusers name them.
VARIANT = re.compile(r"(model|pytorch_model)\.[^.]+?(-\d{5}-of-\d{5})?\.(safetensors|bin)")
SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})(?P<ending>\.[a-z]+)")
MAX_INDEX_BYTES = 256 << 20


@dataclass(frozen=True)
class Layout:
    """The files that make up one checkpoint: their format, and where each tensor is said to be (empty: nobody says)."""

    load_format: str
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    index_file: Path | None = None


def find_layout(path: Path, load_format: str) -> Layout:
    """The weight files at `path` (a folder or one file); an error names what is missing or cannot be told apart."""
    if load_format not in LOAD_FORMATS:
        hint = "; dummy weights have no files: call dummy_params" if load_format == "dummy" else ""
        raise UsageError(f"load_format {load_format!r} is not known; allowed are {', '.join(LOAD_FORMATS)}{hint}", "load_format")
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: there is no such file or folder; give a folder in Hugging Face layout, "
            "or a .safetensors, .bin, .pt, .pth or .npz file"
        )
    if not path.is_dir():
        return Layout(sniff(path) if load_format == "auto" else load_format, (path,))
    candidates = tuple(PATTERNS) if load_format == "auto" else (load_format,)
    for candidate, name in CANONICAL:
        if candidate in candidates and (path / name).is_file():
            return Layout(candidate, (path / name,))
        if candidate in candidates and (path / f"{name}.index.json").is_file():
            return _indexed(path, candidate, path / f"{name}.index.json")
    if load_format == "orbax" or (load_format == "auto" and is_orbax(path)):
        if not is_orbax(path):
            raise CheckpointError(f"{path} is not an orbax checkpoint: it has no _METADATA file; give the folder that orbax wrote")
        return Layout("orbax", (path,))
    for candidate in candidates:
        for pattern in PATTERNS[candidate]:
            layout = _folder_layout(path, candidate, pattern)
            if layout:
                return layout
    if adapters := [file.name for file in sorted(path.iterdir()) if ADAPTER.fullmatch(file.name)]:
        raise UnsupportedError(
            f"{path} holds an adapter ({_some(adapters)}) and no model; adapters are not supported: merge it into its base model "
            "(peft: merge_and_unload, save_pretrained) and give that folder"
        )
    wanted = [pattern for name in (PATTERNS if load_format == "auto" else (load_format,)) for pattern in PATTERNS[name]]
    raise CheckpointError(
        f"no weights in {path}: it holds {_listing(path)}; wanted {' or '.join(wanted)}"
        + ("" if load_format == "auto" else f" (load_format={load_format}; try load_format=auto)")
        + "; finish the download or give another folder"
    )


def left_out(path: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """Names of the files in the folder `path` that are named as weights, of whatever framework, and are none of `files`."""
    used = {file.name for file in files}
    if not path.is_dir() or path.name in used:  # one file, or a folder that is the checkpoint
        return ()
    return tuple(file.name for file in sorted(path.iterdir()) if WEIGHTS.fullmatch(file.name) and file.name not in used and file.is_file())


def is_orbax(path: Path) -> bool:
    """Whether orbax wrote this folder, directly or as the one item of a step."""
    return any((folder / "_METADATA").is_file() for folder in (path, path / "default"))


def sniff(path: Path) -> str:
    """The load_format of a single file, from its first bytes (its ending only decides whose error is shown)."""
    with open(path, "rb") as handle:
        head = handle.read(64)
    endings = {".safetensors": "safetensors", ".npz": "npz", ".bin": "pt", ".pt": "pt", ".pth": "pt", ".ckpt": "pt"}
    by_name = endings.get(path.suffix)
    if head[:4] == b"PK\x03\x04":
        return "npz" if by_name == "npz" else "pt"
    if head[:1] == b"\x80":
        return "pt"
    if by_name is None and head[8:9] == b"{":
        return "safetensors"
    if by_name is None:
        raise CheckpointError(
            f"{path} is no checkpoint that jaxllm knows; allowed are safetensors, torch zip or stream files, npz, and folders of them"
        )
    return by_name


def refuse_pointer(path: Path) -> None:
    """None; CheckpointError if the file is only git-lfs's note of where the weights are."""
    with open(path, "rb") as handle:
        if handle.read(24) == b"version https://git-lfs.":
            raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository")


def _folder_layout(path: Path, load_format: str, pattern: str) -> Layout | None:
    index_files = sorted(path.glob(f"{pattern}.index.json"))
    if len(index_files) > 1:
        # transformers writes variants as model.fp16.safetensors.index.json; the plain one is the default.
        plain = [file for file in index_files if file.name.count(".") == 3]
        if len(plain) != 1:
            raise CheckpointError(f"{path} holds {len(index_files)} index files ({_names(index_files)}); keep one or give a single file")
        index_files = plain
    if index_files:
        return _indexed(path, load_format, index_files[0])
    files = [file for file in sorted(path.glob(pattern)) if file.is_file() and not NOT_WEIGHTS.fullmatch(file.name)]
    # Mistral's own release format repeats the same weights under other names beside the Hugging Face files.
    plain = [file for file in files if not file.name.startswith("consolidated") and not VARIANT.fullmatch(file.name)]
    files = plain or files
    _refuse_partial_shards(path, files)
    return Layout(load_format, tuple(files)) if files else None


def _indexed(path: Path, load_format: str, index_file: Path) -> Layout:
    try:
        if index_file.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index_file} has more than {MAX_INDEX_BYTES} bytes, the limit for an index; the file is damaged")
        weight_map = json.loads(index_file.read_bytes().decode("utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index_file} is not an index: {brief(str(error))}; it must be JSON with weight_map: {{tensor: file}}; fetch it again"
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{index_file} names the shard {brief(shard)}; a shard is a file beside the index, without folders")
    if not shards:
        raise CheckpointError(f"{index_file} names no tensors; fetch it again")
    absent = [shard for shard in shards if not (path / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of the {len(shards)} shards that {index_file} names are not there: {_some(absent)}; "
            f"the folder holds {_listing(path)}; finish the download"
        )
    return Layout(load_format, tuple(path / shard for shard in shards), weight_map, index_file)


def _refuse_partial_shards(path: Path, files: list[Path]) -> None:
    parts: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            parts.setdefault((match["stem"], int(match["total"])), set()).add(int(match["part"]))
    for (stem, total), present in parts.items():
        # Absent numbers are counted, not listed: `total` is only what a file name says, up to 99999.
        if len(present & set(range(1, total + 1))) < total:
            raise CheckpointError(
                f"{path} is half-written: {len(present)} of the {total} shards of {stem} are there "
                f"(numbers {_some(sorted(present))}) and no index file; finish the download"
            )


def _some(items: list, limit: int = 4) -> str:
    return ", ".join(str(item) for item in items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _names(files: list[Path]) -> str:
    return _some([file.name for file in files])


def _listing(path: Path) -> str:
    files = sorted(path.iterdir())
    return _names(files) if files else "nothing"
