"""Text to token ids and back: a Hugging Face tokenizer, read without transformers where its folder allows.

`tokenizer.json` says all that tokenizing needs, and `tokenizers` alone reads it: importing it takes 0.05 s where
transformers takes 1.5. Folders that hold an older format go through transformers' AutoTokenizer once, at load.
No code from a checkpoint ever runs.
"""
import datetime
import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from jaxllm.errors import CheckpointError, UnsupportedError, UsageError
from jaxllm.text.chat import messages_for_template, pick_template, plain, read_date, read_templates, render
from jaxllm.text.settings import NAMED, add_tokens, follow_class, one_line, read_json, read_settings

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "spiece.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json")
OLDER = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


class Tokenizer:
    """A loaded tokenizer; `load_tokenizer` makes one."""

    def __init__(self, backend: tokenizers.Tokenizer, *, special: dict[str, str], templates: dict[str, str],
                 files: tuple[Path, ...], name: str):
        self.backend = backend
        self.special = special      # {"bos_token": "<s>", ...}: what a chat template may name
        self.templates = templates  # {"default": Jinja text, ...}
        self.name = name            # for messages
        self._files = files

    def __len__(self) -> int:
        return self.vocab_size

    @functools.cached_property
    def vocab_size(self) -> int:
        """Tokens that it knows, added ones included; a model may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def added(self) -> dict[int, AddedToken]:
        """Ids of the tokens that stand outside the learned vocabulary; `.special` says which decoding may skip."""
        return self.backend.get_added_tokens_decoder()

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    def _id_of(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special[name]) if name in self.special else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the begin and end tokens that the tokenizer's own rules add."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as e:  # what it says of a lone surrogate, of all things
            raise UsageError(f"the text is not one: {type(text).__name__} with half of a surrogate pair" if isinstance(text, str)
                             else f"a text is a {type(text).__name__}", "prompt") from e

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer does not know give nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, as logprobs show it: U+FFFD where it holds part of a character."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def apply_chat(self, conversation: Sequence[dict], /, **options) -> list[int]:
        """Token ids of a conversation; see `chat_prompt` for the options."""
        return self.chat_prompt(conversation, **options)[0]

    def chat_prompt(self, conversation: Sequence[dict], /, *, chat_template: str | None = None, add_generation_prompt: bool = True,
                    continue_final_message: bool | str = False, tools: list[dict] | None = None, documents: list[dict] | None = None,
                    chat_date: str | datetime.date | None = None, **kwargs) -> tuple[list[int], str | None]:
        """Token ids of a conversation through the chat template, which itself writes the begin token where there is one.

        `chat_template` is Jinja text or the name of one of the tokenizer's templates; kwargs reach the template. `chat_date` is
        what the template is told is now (a date, or ISO 8601 text; None: the clock). It comes back as text if the template asked,
        else None: given as chat_date it makes the same prompt on another day.
        """
        if add_generation_prompt and continue_final_message:
            raise UsageError("add_generation_prompt and continue_final_message exclude each other; "
                             "to continue the last message, pass add_generation_prompt=False", "continue_final_message")
        for name, given in (("tools", tools), ("documents", documents)):
            if given is not None and not (isinstance(given, (list, tuple)) and all(isinstance(each, Mapping) for each in given)):
                kinds = sorted({type(each).__name__ for each in given}) if isinstance(given, (list, tuple)) else [type(given).__name__]
                raise UsageError(f"{name} holds {', '.join(kinds)}; it must be a list of objects" +
                                 (" (the JSON schema of each function)" if name == "tools" else ""), name)
        if "messages" in kwargs:
            raise UsageError("chat_template_kwargs holds 'messages'; the conversation is the first argument", "chat_template_kwargs")
        own = {name: kwargs.pop(name) for name in list(kwargs) if callable(kwargs[name])}  # the caller's functions, such as a strftime_now
        try:
            messages = messages_for_template(conversation)
            variables = {**self.special, "documents": plain(documents, "documents"), **plain(kwargs, "chat_template_kwargs"), **own}
            tools = plain(tools, "tools")
        except RecursionError:
            raise UsageError("the conversation is nested too deeply; messages, tools and documents are a few levels deep", "messages") from None
        template, now = pick_template(self.templates, chat_template, tools is not None, self.name), read_date(chat_date)
        text, dated = render(template, messages, add_generation_prompt=add_generation_prompt, tools=tools, now=now,
                             continue_final_message=continue_final_message, variables=variables)
        return self.encode(text, add_special_tokens=False), now.isoformat() if dated else None

    def fingerprint(self) -> str:
        """A hash over the names and contents of the files it was read from: equal files, equal hash."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self._files:
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()[:16]


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face layout, or of a model on the Hugging Face hub.

    Which begin and end tokens `encode` adds is tokenizer.json's to say; add_bos_token and add_eos_token of
    tokenizer_config.json count only where there is no tokenizer.json, as in transformers.
    Raises CheckpointError where files are missing or damaged, UnsupportedError for kinds that need code of their own.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{folder} is a file; a tokenizer is read from the folder that holds tokenizer.json")
        folder = _download(str(path_or_id))
    file = folder / "tokenizer.json"
    config = read_json(folder / "tokenizer_config.json")
    if file.is_file():
        backend = _read_backend(file)
        settings = read_settings(folder, config, backend)
        backend, special = follow_class(backend, settings), settings.special
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        add_tokens(backend, settings)
    else:
        backend, special = _convert_older(folder)
    backend.no_truncation()
    backend.no_padding()
    files = tuple(sorted(f for f in (folder / name for name in FILES) if f.is_file()))
    return Tokenizer(backend, special=special, templates=read_templates(folder, config), files=files, name=str(path_or_id))


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json."""
    try:
        content = file.read_bytes()
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror}; check its permissions") from e
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not a tokenizer; run `git lfs pull` in its repository")
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as e:  # the Rust side raises bare Exception
        raise CheckpointError(f"{file} ({len(content)} bytes) is not a tokenizer: {one_line(e)}; fetch the file again") from e


def _convert_older(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a folder without tokenizer.json, through transformers, and its named tokens."""
    found = [name for name in OLDER if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has no tokenizer: looked for tokenizer.json, {', '.join(OLDER)}; copy the tokenizer's "
                              "files from the model's repository, or name another folder with tokenizer=")
    if found[0].endswith(".model") and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(f"reading {folder / found[0]} needs the package sentencepiece; `pip install sentencepiece protobuf`, "
                              "or put the model's tokenizer.json beside it")
    from transformers import AutoTokenizer
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises ValueError, OSError, ImportError and KeyError for a damaged file
        raise CheckpointError(f"{folder / found[0]} could not be read as a tokenizer: {one_line(e)}; "
                              "put a tokenizer.json beside it") from e
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(f"tokenizer class {type(loaded).__name__} of {folder} runs in Python only; "
                               "jaxllm reads tokenizers that have a tokenizer.json")
    for name in NAMED:
        if getattr(loaded, name, None):
            backend.add_special_tokens([getattr(loaded, name)])
    return backend, {**_customary(backend), **loaded.special_tokens_map}


def _customary(backend: tokenizers.Tokenizer) -> dict[str, str]:
    """The begin, end and unknown tokens that a bare SentencePiece vocabulary names by custom."""
    custom = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {name: token for name, token in custom.items() if backend.token_to_id(token) is not None}


def _download(model_id: str) -> Path:
    """The local copy of a hub model's tokenizer files."""
    if model_id.count("/") > 1 or model_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{model_id} does not exist; give a folder in Hugging Face layout, or a hub id like owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model_id, allow_patterns=[*FILES, "additional_chat_templates/*", "config.json"]))
    except Exception as e:  # huggingface_hub raises its own, httpx's and ValueError
        raise CheckpointError(f"{model_id} is not a folder here, and fetching it from the Hugging Face hub failed: "
                              f"{one_line(e)}; check the name, the network and your token, or give a folder") from e
