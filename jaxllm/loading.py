"""From a model's name to its config, weights and tokenizer's place: `builtin:NAME`, a folder, or a Hugging Face id."""
import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.checkpoint.copying import equal_values
from jaxllm.checkpoint.index import open_checkpoint
from jaxllm.checkpoint.layout import NOT_WEIGHTS
from jaxllm.checkpoint.load import dummy_params, load_params
from jaxllm.checkpoint.mapped import brief
from jaxllm.checkpoint.rules import Rule, sources
from jaxllm.config import DTYPES, ModelConfig
from jaxllm.errors import CheckpointError, JaxllmError, UsageError, about
from jaxllm.fields import FIELDS, GENERATION_CHANGING, GENERATION_FIELDS, SAMPLING, check_fields, known_ids, refuse_changing
from jaxllm.models import decoder
from jaxllm.models.families import overridden, reach
from jaxllm.models.registry import family

log = logging.getLogger("jaxllm")

BUILTIN = Path(__file__).parent / "builtin"
MAX_JSON_BYTES = 16 << 20
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
        if all(NOT_WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors")):  # an older repository: the same weights as pickles, which we read safely
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
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes; fetch the model again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}; check its permissions") from e
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, an integer of 5000 digits, lists in lists without end
        raise CheckpointError(f"{path} is not valid JSON ({brief(str(e), 200)}); fetch the model again") from e
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
    if not hf_overrides:
        return config
    if not isinstance(hf_overrides, dict) or not all(isinstance(name, str) for name in hf_overrides):
        raise UsageError(f"hf_overrides is {brief(hf_overrides)}; it must be a dict from the keys of config.json to values", "hf_overrides")
    return overridden(config, hf_overrides)


def read_generation_config(path: Path) -> dict:
    """The generation_config.json of a model folder, its fields checked; {} if there is none."""
    file = path / "generation_config.json"
    given = read_json(file)
    check_fields(given, GENERATION_FIELDS, f"{file}: ")
    return given


def own_sampling(generation_config: dict) -> dict:
    """The fields of SamplingParams that a generation_config.json sets, not checked; what it asks beyond them is refused by name."""
    refuse_changing(generation_config, GENERATION_CHANGING, "generation_config.json: ")
    own = {ours: generation_config[name] for name, ours in SAMPLING.items() if generation_config.get(name) is not None}
    return own | ({"temperature": 0.0} if generation_config.get("do_sample") is False else {})


def account(path: Path) -> dict[str, dict]:
    """What becomes of the keys of a model folder's JSON files: {file: {"honoured": keys, "ignored": keys, "refused": why or None}}."""
    def config():
        given = read_config(path)
        describe(path, given)
        return given

    def generation():
        given = read_generation_config(path)
        own_sampling(given)
        return given

    found = {}
    for name, read, known in (("config.json", config, FIELDS), ("generation_config.json", generation, GENERATION_FIELDS)):
        if not (path / name).is_file():
            continue
        refused, given = None, {}
        try:
            given = read_json(path / name)
            read()
        except JaxllmError as e:
            refused = str(e)
        found[name] = {"honoured": sorted(set(given) & set(known)), "ignored": sorted(set(given) - set(known)), "refused": refused}
    return found


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
    reader, cfg = describe(path, config, max_model_len)
    generation = read_generation_config(path)
    more = {name: known_ids(generation.get(name), name, cfg.vocab_size, str(path / "generation_config.json"))
            for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    cfg = dataclasses.replace(cfg, eos_token_ids=tuple(dict.fromkeys(cfg.eos_token_ids + more["eos_token_id"])))
    stated = config.get("dtype") or config.get("torch_dtype")
    if params is not None:
        if cfg.tied and getattr(params, "head", None) is not None:  # weights that were loaded as `_as_stored` found them
            cfg = dataclasses.replace(cfg, tied=False)
        return LoadedModel(path, cfg, _checked(params, cfg, dtype), generation, ())
    if load_format == "dummy":
        chosen = dtype if dtype != "auto" else _usable(stated, "float32")
        return LoadedModel(path, cfg, dummy_params(decoder.template(cfg, jnp.dtype(chosen)), seed, place=place), generation, ())
    with open_checkpoint(path, load_format) as checkpoint:
        chosen = dtype if dtype != "auto" else _usable(stated, _commonest(checkpoint))
        cfg, rules = _as_stored(cfg, reader.RULES, checkpoint)
        params = load_params(checkpoint, rules, decoder.template(cfg, jnp.dtype(chosen)), place=place,
                             map_location=pt_load_map_location)
        return LoadedModel(path, cfg, params, generation, tuple(Path(f) for f in checkpoint.files))


def describe(path: Path, config: dict, max_model_len: int | None = None):
    """(family module, ModelConfig) of a model folder's config; errors name the file, a context that is too long is warned of."""
    with about(path / "config.json"):
        reader = family(config)
        cfg = reader.read_config(config, max_model_len)
        longest = reach(config, cfg)
    if max_model_len is not None and max_model_len > longest:
        log.warning("max_model_len is %d and %s is made for %d tokens (max_position_embeddings and the rope scaling): what lies beyond is "
                    "computed as transformers computes it, and is likely to be nonsense", max_model_len, path, longest)
    return reader, cfg


def _as_stored(cfg: ModelConfig, rules, checkpoint):
    """(ModelConfig, rules) with the head tied or not as the tensors say, by transformers' own rule.

    A tied head that differs from the embedding is a head; where the head alone was saved, it is the embedding.
    """
    held = sources(rules, checkpoint, ("embedding", "head"))
    if not cfg.tied:
        if "embedding" in held and "head" not in held:  # transformers would draw one at random
            raise CheckpointError(f"{checkpoint.path} has no tensor for the head and config.json does not tie it to {held['embedding']}; "
                                  "if the model is tied, set \"tie_word_embeddings\": true in config.json or hf_overrides")
        return cfg, rules
    if "embedding" not in held and "head" in held:
        swap = [dataclasses.replace(rule, target="embedding", optional=False) if isinstance(rule, Rule) and rule.target == "head" else rule
                for rule in rules]
        return cfg, swap
    if {"embedding", "head"} <= set(held) and not equal_values(checkpoint[held["embedding"]], checkpoint[held["head"]]):
        log.warning("%s: config.json ties %s to %s and they differ, so the model has both; \"tie_word_embeddings\": false says so",
                    checkpoint.path, held["head"], held["embedding"])
        return dataclasses.replace(cfg, tied=False), rules
    return cfg, rules


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


def _usable(stated: str | None, otherwise: str) -> str:
    name = (stated or otherwise).removeprefix("torch.")
    if name in DTYPES:
        return name
    log.warning("config.json: dtype %s is none of %s; the model runs in %s", brief(stated), ", ".join(DTYPES), otherwise)
    return otherwise


def _commonest(checkpoint) -> str:
    totals = {}
    for tensor in checkpoint.values():
        totals[str(tensor.dtype)] = totals.get(str(tensor.dtype), 0) + tensor.nbytes
    name = max(totals, key=totals.get)
    return name if name in DTYPES else "float32"


def weight_bytes(params) -> int:
    """Bytes of a parameter pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
