"""Mutated input files, each of which must give an answer or a one-line error of ours within a second.

    python tools/fuzz_inputs.py                          # every target, 10,000 cases each
    python tools/fuzz_inputs.py config --count 500 --seed 3

A finding is printed with the seed and the number of its case, which make it again. Exit status 1 if there was one.
"""
import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxllm import LLM, SamplingParams  # noqa: E402
from jaxllm.commands.generate import _prompt_of, as_json  # noqa: E402
from jaxllm.errors import JaxllmError  # noqa: E402
from jaxllm.fields import CHANGING, FIELDS, GENERATION_CHANGING, GENERATION_FIELDS, ROPE_FIELDS  # noqa: E402
from jaxllm.loading import account, load_model, own_sampling  # noqa: E402
from jaxllm.prompts import PROMPT_FIELDS, SAMPLING_FIELDS, read_prompts, sampling_of  # noqa: E402
from jaxllm.text.chat import read_date  # noqa: E402
from jaxllm.text.settings import NAMED  # noqa: E402
from jaxllm.text.tokenizer import load_tokenizer  # noqa: E402
from tests.tiny import make_folder  # noqa: E402

SECONDS = 1.0   # for one case, beside which the read of a tiny model does not count
LETTERS = 2000  # of an error

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "hidden_act": "silu",
    "tie_word_embeddings": True, "rope_theta": 10000.0, "torch_dtype": "float32", "eos_token_id": [2, 3], "bos_token_id": 1, "use_cache": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
CONFIGS = [
    CONFIG, {**CONFIG, "rope_parameters": YARN, "attention_bias": False},
    {**CONFIG, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention"]},
    {**CONFIG, "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], "factor": 2.0},
     "original_max_position_embeddings": 32},
    {**CONFIG, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 16}, "partial_rotary_factor": 0.5},
    {**CONFIG, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {**CONFIG, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
]
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [2, 3],
              "pad_token_id": 0, "bos_token_id": 1, "max_new_tokens": 20, "num_beams": 1, "transformers_version": "4.51.0"}

END = {"content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
TOKENS = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": {"__type": "AddedToken", **END}, "image_token": "<img>"}
FLAGS = {"add_prefix_space": False, "split_special_tokens": False, "legacy": False, "add_bos_token": True, "model_max_length": 256}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOKENIZERS = [
    {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS, **FLAGS, "chat_template": CHAT, "extra_special_tokens": ["<x>"]},
    {"tokenizer_class": "Qwen2Tokenizer", **TOKENS, "extra_special_tokens": {"x_token": "<x>"}, "additional_special_tokens": ["<y>"],
     "chat_template": [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "{{ tools }}"}]},
    {"tokenizer_class": "LlamaTokenizer", "chat_template": CHAT, "added_tokens_decoder": {"256": END}},
]
DRAWN = {
    "temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 1, "seed": 3, "max_tokens": 2, "min_tokens": 1, "stop": ["a"],
    "stop_token_ids": [7], "bad_words": ["b"], "logit_bias": {"5": 1.5}, "allowed_token_ids": list(range(40)), "logprobs": 1,
    "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "prompt_logprobs": 1, "ignore_eos": False,
    "skip_special_tokens": True, "detokenize": True, "logits_digest": True,
}
TALK = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
PROMPTS = ["hello", {"prompt": "hello", **DRAWN}, {"prompt_token_ids": [1, 2, 3], "max_tokens": 2, "stop": "b"}, {"messages": TALK, "max_tokens": 2}]

STRANGE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**24, 2**31, 2**63, -2**63, 10**30, 10**4000, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan"),
    "", "a", " ", "2", "\n", "a\nb", "\0", "é日本😀", "\ud800", "\ud83d", "0", "true", "null", "<s>", "<|end|>", "../x", "a" * 10_000,
    "{{ x", "{% for i in range(10) %}{{ i }}{% endfor %}", "{{ strftime_now('%d') }}", "float32", "LlamaForCausalLM", "sliding_attention",
    [], [[]], [None], [2], [2, "a"], [[2]], [1.5] * 3, ["a"] * 300, [{"role": "user", "content": "a"}],
    {}, {"a": {}}, {"a": {"a": {"a": []}}}, {"": 0}, {"1": 1}, {"content": "a"}, {"content": None}, {"text": "a", "type": "text"}, {"rope_type": "yarn"},
]
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 100_000, b'{"a":' * 5000, b"9" * 6000, b"\\ud800", b"e400", b",", b'"', b"NaN", b"\n")


@dataclass(frozen=True)
class Target:
    """One kind of input: whole ones to begin from, the keys to try, and what makes the reader of damaged ones in a folder of its own."""

    wholes: list
    keys: tuple[str, ...]
    reader: Callable[[Path], Callable[[bytes], None]]


def mutated(target: Target, walk: random.Random) -> bytes:
    """A whole input with a few of its values, keys or bytes changed."""
    raw = json.dumps(walk.choice(target.wholes)).encode()
    for _ in range(walk.choice((1, 1, 2, 3))):
        raw = _other_bytes(raw, walk) if walk.random() < 0.2 else _other_values(raw, target.keys, walk)
    return raw


def _other_bytes(raw: bytes, walk: random.Random) -> bytes:
    at, end = sorted(walk.choices(range(len(raw) + 1), k=2))
    near, noise = at + walk.choice((1, 2, 9)), walk.randbytes(walk.randint(1, 4))
    return walk.choice((raw[:at], raw[:at] + raw[near:], raw[:at] + raw[end:], raw[:end] + raw[at:], raw[:at] + noise + raw[at:],
                        raw[:at] + walk.choice(BYTES) + raw[at:], raw[:at] + noise[:1] + raw[at + 1:]))


def _other_values(raw: bytes, keys: tuple[str, ...], walk: random.Random) -> bytes:
    try:
        whole = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    inner = whole
    while isinstance(inner, dict | list) and (deeper := [v for v in _values(inner) if isinstance(v, dict | list) and v]) and walk.random() < 0.4:
        inner = walk.choice(deeper)
    places = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
    kind = walk.randrange(8)
    if not places or walk.random() < 0.03:
        whole = walk.choice(STRANGE)
    elif kind == 0:
        del inner[walk.choice(places)]
    elif kind == 1 and isinstance(inner, dict):
        inner[walk.choice(keys)] = walk.choice(STRANGE)
    elif kind == 2 and isinstance(inner, dict):
        old = walk.choice(places)
        inner[walk.choice(("", "a", "0", "-1", old.upper(), *walk.choices(keys, k=3)))] = inner.pop(old)
    elif kind == 3 and isinstance(inner, list):
        inner[:] = (inner * walk.choice((0, 2, 1000)))[:5000]
    else:
        inner[walk.choice(places)] = walk.choice(STRANGE)
    return _dumped(whole)


def _values(inner: dict | list) -> list:
    return list(inner.values()) if isinstance(inner, dict) else inner


def _dumped(whole) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(whole).encode()
    finally:
        sys.set_int_max_str_digits(limit)


# -- what is read ----------------------------------------------------------------------------------------------------------


def _small_model(folder: Path, **more: tuple[int, ...]) -> Path:
    """The folder, with a Llama of one layer that CONFIG describes and `more` weights of that layer, by shape."""
    folder.mkdir(exist_ok=True)
    at = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (24, 8), "model.norm.weight": (8,), f"{at}input_layernorm.weight": (8,), f"{at}post_attention_layernorm.weight": (8,),
              **{f"{at}self_attn.{name}_proj.weight": (rows, 8) for name, rows in {"q": 8, "k": 4, "v": 4, "o": 8}.items()},
              **{f"{at}mlp.{name}_proj.weight": (8, 8) for name in ("gate", "up", "down")},
              **{f"{at}self_attn.{name}.weight": shape for name, shape in more.items()}}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def config(folder: Path):
    """A model's config: accounted for, and the model loaded by it."""
    places = {False: _small_model(folder), True: _small_model(folder / "normed", q_norm=(4,), k_norm=(4,))}

    def read(raw: bytes):
        place = places[b"Qwen3" in raw]
        (place / "config.json").write_bytes(raw)
        account(place)
        hash(load_model(str(place)).cfg)
    return read


def generation_config(folder: Path):
    """How a model wants to be drawn from: accounted for, and made SamplingParams of."""
    _small_model(folder)

    def read(raw: bytes):
        (folder / "generation_config.json").write_bytes(raw)
        account(folder)
        SamplingParams(**own_sampling(load_model(str(folder)).generation_config))
    return read


def tokenizer_config(folder: Path):
    """A tokenizer's settings: read, a text there and back, and a conversation through whatever template there is."""
    make_folder(folder)

    def read(raw: bytes):
        (folder / "tokenizer_config.json").write_bytes(raw)
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("hello <x> é"))
        tokenizer.apply_chat([{"role": "user", "content": "hello"}])
    return read


def prompts(folder: Path):
    """A line of a prompts file, and generation from it with the lengths cut short."""
    model, file, now = make_folder(folder), folder / "prompts.jsonl", read_date("2031-05-04")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    llm = LLM(model, load_format="dummy", max_num_seqs=4, max_num_batched_tokens=32)

    def read(raw: bytes):
        file.write_bytes(raw)
        lines = read_prompts(str(file))
        params = [sampling_of(line, {}) for line in lines]
        for p in params:
            p.n, p.max_tokens, p.min_tokens = min(p.n, 4), min(p.max_tokens or 2, 2), min(p.min_tokens, 2)
        for index, result in enumerate(llm.generate([_prompt_of(llm, line, now)[0] for line in lines], params)):
            json.dumps(as_json(index, result))
    return read


TARGETS = {
    "config": Target(CONFIGS, (*FIELDS, *ROPE_FIELDS, *CHANGING), config),
    "generation_config": Target([GENERATION], (*GENERATION_FIELDS, *GENERATION_CHANGING), generation_config),
    "tokenizer_config": Target(TOKENIZERS, (*NAMED, *TOKENIZERS[0], *TOKENIZERS[1], *END, "added_tokens_decoder", "auto_map"), tokenizer_config),
    "prompts": Target(PROMPTS, (*PROMPT_FIELDS, *sorted(SAMPLING_FIELDS), *TALK[0], "tool_calls", "reasoning_content"), prompts),
}


# -- what is wrong ---------------------------------------------------------------------------------------------------------


def findings(name: str, count: int, seed: int, first: int = 0) -> tuple[list[str], int]:
    """(what went wrong in cases `first` to `first + count` of a target, how many gave an answer).

    Each case has a generator of its own, so that one can be run alone.
    """
    target, found, answers = TARGETS[name], [], 0
    with tempfile.TemporaryDirectory() as folder:
        read = target.reader(Path(folder))
        for whole in target.wholes:  # one that is refused would make the cases that begin from it empty ones
            read(json.dumps(whole).encode())
        for case in range(first, first + count):
            raw = mutated(target, random.Random(f"{name} {seed} {case}"))
            answered, wrong, seconds = _tried(read, raw)
            if wrong is None and seconds > SECONDS:  # the first may have compiled
                answered, wrong, seconds = _tried(read, raw)
                wrong = wrong or (f"{seconds:.1f} s" if seconds > SECONDS else None)
            answers += answered
            if wrong is not None:
                found.append(f"{name} seed {seed} case {case}: {wrong}; {raw[:300]!r}")
    return found, answers


def _tried(read: Callable[[bytes], None], raw: bytes) -> tuple[bool, str | None, float]:
    """(whether there was an answer, what is wrong with the error if that is so, seconds)."""
    answered, wrong, started = False, None, time.monotonic()
    try:
        read(raw)
        answered = True
    except JaxllmError as error:
        text = str(error)
        if not text.isprintable() or len(text) > LETTERS or text.encode("utf-8", "replace").decode() != text:
            wrong = f"an error of {len(text)} letters or several lines: {text[:200]!r}"
    except Exception as error:  # what the shell would report as a fault of the program
        wrong = f"{type(error).__name__}: {str(error)[:200]!r}"
    return answered, wrong, time.monotonic() - started


def main() -> int:
    """Runs the targets that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="cases of each target (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    logging.getLogger("jaxllm").setLevel(logging.CRITICAL)  # warnings of a damaged file are no findings
    status = 0
    for name in args.targets:
        started = time.monotonic()
        found, answers = findings(name, args.count, args.seed, args.first)
        print(f"{name}: {args.count} cases in {time.monotonic() - started:.0f} s, {answers} answers, {len(found)} findings")
        for line in found:
            print(f"  {line}")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
