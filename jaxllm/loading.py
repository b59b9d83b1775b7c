"""From a model's name to its config, weights and tokenizer's place: `builtin:NAME`, a folder, or a Hugging Face id."""
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.checkpoint.index import open_checkpoint
from jaxllm.checkpoint.load import dummy_params, load_params
from jaxllm.config import DTYPES, ModelConfig
from jaxllm.errors import CheckpointError, UsageError
from jaxllm.models import decoder
from jaxllm.models.registry import family

BUILTIN = Path(__file__).parent / "builtin"
LOAD_FORMATS = ("auto", "safetensors", "pt", "npz", "orbax", "dummy")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the files that say how to talk to it."""

    path: Path
    cfg: ModelConfig
    params: decoder.Decoder
    generation_config: dict
    files: tuple[Path, ...]  # weights, for the fingerprint; empty for dummy weights


def resolve(model: str) -> Path:
    """The folder of a model: `builtin:NAME`, an existing path, or a Hugging Face id, which is fetched if it is not cached."""
    if model.startswith("builtin:"):
        path = BUILTIN / model.removeprefix("builtin:")
        if not (path / "config.json").is_file():
            names = sorted(p.name for p in BUILTIN.iterdir()) if BUILTIN.is_dir() else []
            raise UsageError(f"there is no built-in model {model!r}; there is: {', '.join('builtin:' + n for n in names) or 'none'}", "model")
        return path
    path = Path(model).expanduser()
    if path.exists():
        return path
    parts = model.split("/")
    if len(parts) > 2 or path.is_absolute() or model.startswith((".", "~")) or not all(parts):
        raise CheckpointError(f"the model folder {model} does not exist; give a folder, a Hugging Face id (name/name) or builtin:tales")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):  # an older repository: the same weights as pickles, which we read safely
            folder = Path(snapshot_download(model, allow_patterns=[*wanted, "*.bin"]))
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as e:
        raise CheckpointError(f"{model} is neither a folder here nor a model that the Hugging Face hub gives "
                              f"({type(e).__name__}); check the name, or fetch it and give its folder") from e


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}); fetch the model again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch the model again")
    return value


def read_config(path: Path, hf_overrides: dict | None = None) -> dict:
    """The config.json of a model folder, with `hf_overrides` laid over it."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; a model is a folder with config.json, weights and a tokenizer")
    config = read_json(path / "config.json")
    if not config:
        raise CheckpointError(f"{path} has no config.json; a model folder in Hugging Face layout is needed")
    return {**config, **(hf_overrides or {})}


def load_model(model: str, *, dtype: str = "auto", load_format: str = "auto", hf_overrides: dict | None = None,
               max_model_len: int | None = None, seed: int = 0, place=None, pt_load_map_location="cpu", params=None) -> LoadedModel:
    """The model with its weights on the default device, or with `params`, and then no weights are read.

    dtype "auto" is the checkpoint's own: what its config says, else what most bytes of its weights are. Raises
    UsageError, CheckpointError or UnsupportedError with what to do.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"load_format={load_format!r}; it must be one of {', '.join(LOAD_FORMATS)}", "load_format")
    dtype = dtype_name(dtype)
    path = resolve(model)
    config = read_config(path, hf_overrides)
    reader = family(config)
    cfg = reader.read_config(config, max_model_len)
    generation = read_json(path / "generation_config.json")
    if (eos := generation.get("eos_token_id")) is not None:
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        cfg = dataclasses.replace(cfg, eos_token_ids=tuple(dict.fromkeys(cfg.eos_token_ids + ids)))
    stated = config.get("dtype") or config.get("torch_dtype")
    if params is not None:
        return LoadedModel(path, cfg, _checked(params, cfg, dtype), generation, ())
    if load_format == "dummy":
        chosen = dtype if dtype != "auto" else _usable(stated) or "float32"
        return LoadedModel(path, cfg, dummy_params(decoder.template(cfg, jnp.dtype(chosen)), seed, place=place), generation, ())
    with open_checkpoint(path, load_format) as checkpoint:
        chosen = dtype if dtype != "auto" else _usable(stated) or _commonest(checkpoint)
        params = load_params(checkpoint, reader.RULES, decoder.template(cfg, jnp.dtype(chosen)), place=place,
                             map_location=pt_load_map_location)
        return LoadedModel(path, cfg, params, generation, tuple(Path(f) for f in checkpoint.files))


def dtype_name(dtype) -> str:
    """"auto" or one of DTYPES, from its name, vLLM's other names for it, or a NumPy or JAX dtype."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(getattr(dtype, "dtype", None), "name", None) \
        or getattr(dtype, "__name__", None)
    name = {"half": "float16", "float": "float32"}.get(name, name)
    if name not in ("auto", *DTYPES):
        raise UsageError(f"dtype={dtype!r:.80}; it must be auto or one of {', '.join(DTYPES)} (half, float)", "dtype")
    return name


def shapes(params):
    """The pytree with (shape, name of the dtype) in place of each array."""
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), params)


def _checked(params, cfg: ModelConfig, dtype: str) -> decoder.Decoder:
    """`params`, once it is known to be weights of this model in this dtype."""
    own = getattr(getattr(params, "embedding", None), "dtype", None)
    if own is None or str(own) not in DTYPES or dtype not in ("auto", str(own)):
        raise UsageError(f"params holds weights of dtype {own}; it must be a pytree as load_params returns, in one of "
                         f"{', '.join(DTYPES)}, and dtype={dtype!r} must be \"auto\" or the same", "params")
    if shapes(params) != shapes(decoder.template(cfg, own)):
        raise UsageError("params differs in structure, shapes or dtypes from what the model's config.json says", "params")
    return params


def _usable(stated) -> str | None:
    name = str(stated or "").removeprefix("torch.")
    return name if name in DTYPES else None


def _commonest(checkpoint) -> str:
    totals = {}
    for tensor in checkpoint.values():
        totals[str(tensor.dtype)] = totals.get(str(tensor.dtype), 0) + tensor.nbytes
    name = max(totals, key=totals.get)
    return name if name in DTYPES else "float32"


def weight_bytes(params) -> int:
    """Bytes of a parameter pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
