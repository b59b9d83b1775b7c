"""What the files beside a tokenizer.json say of it, in the order in which transformers 5 believes them.

tokenizer_config.json goes first. Only where it has no `added_tokens_decoder` (folders from before 2023, and those that
trainers wrote by hand) special_tokens_map.json goes over it and added_tokens.json counts.
"""
import dataclasses
import json
import logging
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from jaxllm.errors import CheckpointError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MOST_TOKENS = 1 << 24  # an id beyond it is no token's: the largest vocabularies have a quarter of a million
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")  # where Qwen's vocabulary was learned within, as each of its tokenizer.json says

log = logging.getLogger("jaxllm")


@dataclasses.dataclass
class Settings:
    """A tokenizer's folder, but for its vocabulary."""

    config: dict                       # tokenizer_config.json
    special: dict[str, str]            # {"bos_token": "<s>", ...}, a model's own names among them: what a chat template may name
    tokens: list[AddedToken]           # to be added, in this order, where they are not there yet
    ids: dict[str, int]                # what the files say of their ids
    class_name: str | None             # the class of transformers that has rules of its own


def read_settings(folder: Path, config: dict, backend: tokenizers.Tokenizer) -> Settings:
    """The settings in the files of a folder, whose tokenizer_config.json holds `config` and whose vocabulary is `backend`.

    Raises CheckpointError, naming the file and the key, for what is not of its type.
    """
    file = folder / "tokenizer_config.json"
    class_name = _class_name(folder, config, backend)
    said, own, over, beside = {**DEFAULTS.get(class_name, {}), **config}, {}, {}, folder / "special_tokens_map.json"
    if "additional_special_tokens" in said and not said.get("extra_special_tokens"):
        said["extra_special_tokens"] = said.pop("additional_special_tokens")
    if isinstance(said.get("extra_special_tokens"), dict):
        own = said.pop("extra_special_tokens")
    if config.get("added_tokens_decoder") is not None:
        declared = _decoder(config["added_tokens_decoder"], file)
    else:
        first = said.get("extra_special_tokens")
        said |= (over := read_json(beside))
        if isinstance(said.get("extra_special_tokens"), dict):
            own = own | said.pop("extra_special_tokens")
        elif "extra_special_tokens" in over:
            said["extra_special_tokens"] = [*_listed(first, file), *_listed(over["extra_special_tokens"], beside)]
        values = [*(said.get(name) for name in NAMED), *_listed(said.get("extra_special_tokens"), file)]
        names = {text for value in values if isinstance(text := value.get("content") if isinstance(value, dict) else value, str)}
        declared = _encoder(read_json(folder / "added_tokens.json"), names, folder / "added_tokens.json")
        declared |= backend.get_added_tokens_decoder()
    more = said.get("extra_special_tokens", said.get("additional_special_tokens"))
    extra = [_token(value, f"{file}: extra_special_tokens") for value in _listed(more, file)]
    own = {key: value for key, value in said.items()
           if key.endswith("_token") and key not in NAMED and isinstance(value, (str, dict))} | own
    if clash := {"messages", "tools", "documents", "add_generation_prompt"} & set(own):
        raise CheckpointError(f"{file}: extra_special_tokens names a token {min(clash)!r}; chat templates call something else by that name")
    named = {name: _token(value, f"{beside if name in over else file}: {name}")
             for name, value in {**{n: said.get(n) for n in NAMED}, **own}.items() if value not in (None, "")}
    special = {name: token.content for name, token in named.items()}
    tokens = [declared[index] for index in sorted(declared)]
    known = {token.content for token in (*tokens, *(() if class_name else backend.get_added_tokens_decoder().values()))}
    for token in tokens:
        token.special = token.special or token.content in special.values()
    tokens += [AddedToken(token.content, special=True, normalized=token.normalized, lstrip=token.lstrip, rstrip=token.rstrip,
                          single_word=token.single_word) for token in (*named.values(), *extra) if token.content not in known]
    if class_name == "Qwen2Tokenizer":  # which adds them once more, without their flags
        tokens += [AddedToken(token.content, special=True) for token in (*named.values(), *extra)]
    for name in ("split_special_tokens", "add_prefix_space", "legacy"):
        if not isinstance(config.get(name), bool | None):
            raise CheckpointError(f"{file}: {name} is {config[name]!r:.60}; it must be true or false")
    return Settings(config, special, tokens, {token.content: index for index, token in declared.items()}, class_name)


def add_tokens(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """None; the tokens of the settings are in the tokenizer. Their ids follow one another from the end of the vocabulary."""
    backend.add_tokens(settings.tokens)
    for content, index in settings.ids.items():
        if (found := backend.token_to_id(content)) != index:
            log.warning("the token %r is %s in the tokenizer and %d in the files beside it", content, found, index)


def read_json(file: Path) -> dict:
    """The object in a JSON file, {} when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is not readable as JSON: {one_line(e)}; fetch the file again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, an object is needed; fetch the file again")
    return content


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _token(value, where: str) -> AddedToken:
    """A token as the files spell it: its text, or an object with its text and flags. Special tokens are not normalized."""
    flags = {name: value[name] for name in FLAGS if name in value} if isinstance(value, dict) else {}
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content or not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{where} is {value!r:.80}; it must be a text, or an object with the text as 'content' and flags of true or false")
    return AddedToken(content, **{"special": not isinstance(value, dict), **flags})


def _listed(value, file: Path) -> list:
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{file}: extra_special_tokens is {value!r:.80}; it must be a list of tokens, or an object from names to them")
    return value or []


def _decoder(declared, file: Path) -> dict[int, AddedToken]:
    if not isinstance(declared, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder is a JSON {type(declared).__name__}; it must be an object from ids to tokens")
    out = {}
    for key, value in declared.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < MOST_TOKENS) or not isinstance(value, dict):
            raise CheckpointError(f"{file}: added_tokens_decoder has {key!r:.40}: {value!r:.60}; "
                                  f"it must map ids from 0 to {MOST_TOKENS - 1} to objects")
        out[int(key)] = _token(value, f"{file}: added_tokens_decoder[{key}]")
    return out


def _encoder(declared: dict, special: set[str], file: Path) -> dict[int, AddedToken]:
    for content, index in declared.items():
        if type(index) is not int or not 0 <= index < MOST_TOKENS or not content:
            raise CheckpointError(f"{file}: {content!r:.60} is {index!r:.60}; each token must have an id from 0 to {MOST_TOKENS - 1}")
    return {index: AddedToken(content, normalized=content not in special, special=content in special)
            for content, index in declared.items()}


# -- classes of transformers that set parts of a tokenizer whatever its tokenizer.json says ---------------------------------

DEFAULTS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}


def _class_name(folder: Path, config: dict, backend: tokenizers.Tokenizer) -> str | None:
    """Which of the classes above transformers takes for the folder; None: tokenizer.json alone counts."""
    try:
        model = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):  # there may be none; what is wrong with it, its reader says
        model = None
    name = config.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: tokenizer_class is {name!r:.60}; it must be a text")
    name = name and name.removesuffix("Fast")
    if model == "qwen2" and isinstance(backend.model, tokenizers.models.BPE) or (model == "qwen3" and name is None):
        return "Qwen2Tokenizer"
    parts = [part.__getstate__() for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    if name == "LlamaTokenizer" and any(b"ByteLevel" in part for part in parts):
        return None  # Llama 3 under the name of Llama 2's class
    return name if name in DEFAULTS and model != "mistral" and isinstance(backend.model, tokenizers.models.BPE) else None


def follow_class(backend: tokenizers.Tokenizer, settings: Settings) -> tokenizers.Tokenizer:
    """The tokenizer as its class in transformers makes it of the same vocabulary, `add_prefix_space` included."""
    name, prefix = settings.class_name, settings.config.get("add_prefix_space")
    if name is None:
        return backend
    model, ends = backend.model, backend.post_processor
    backend = tokenizers.Tokenizer(model)  # without the added tokens: the settings hold those that the class takes
    if ends is not None:
        backend.post_processor = ends
    if name == "LlamaTokenizer":
        scheme = "never" if prefix is False else "always" if settings.config.get("legacy") else "first"
        strip = [] if prefix is False else [decoders.Strip(content=" ", left=1)]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        model.fuse_unk = model.byte_fallback = True
    else:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=name == "GPT2Tokenizer")
        words = [pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), behavior="isolated", invert=False)]
        if name == "Qwen2Tokenizer":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_]) if name == "Qwen2Tokenizer" else bytes_
        backend.decoder = decoders.ByteLevel()
        model.fuse_unk = model.byte_fallback = False
    model.dropout = model.unk_token = None
    return backend
