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

from jaxllm.errors import JaxllmError
from jaxllm.fields import CHANGING, FIELDS, GENERATION_CHANGING, GENERATION_FIELDS, ROPE_FIELDS
from jaxllm.loading import account, load_model, own_sampling
from jaxllm.sampling_params import SamplingParams

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
                                "original_max_position_embeddings": 16}},
    {**CONFIG, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.5},
    {**CONFIG, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
]
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [2, 3],
              "pad_token_id": 0, "bos_token_id": 1, "max_new_tokens": 20, "num_beams": 1, "transformers_version": "4.51.0"}
ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**24, 2**31, 2**63, 10**30, 10**4000, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan"),
       "", "2", "a\nb", "\ud800", "float32", "LlamaForCausalLM", "sliding_attention", [], [None], [2], [2, "a"], [[2]], [1.5] * 3, {}, {"a": {}},
       {"rope_type": "yarn"}]
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 100_000, b'{"a":' * 5000, b"9" * 6000, b"\\ud800", b"e400", b",", b'"', b"NaN")


@dataclass(frozen=True)
class Target:
    """One kind of input: whole ones to begin from, the keys to try, and what reads a damaged one in a folder of its own."""

    wholes: tuple[bytes, ...]
    keys: tuple[str, ...]
    prepare: Callable[[Path], None]
    read: Callable[[Path, bytes], None]


def mutated(target: Target, walk: random.Random) -> bytes:
    """A whole input with a few of its values, keys or bytes changed."""
    raw = walk.choice(target.wholes)
    for _ in range(walk.choice((1, 1, 2, 3))):
        raw = _other_bytes(raw, walk) if walk.random() < 0.25 else _other_values(raw, target.keys, walk)
    return raw


def _other_bytes(raw: bytes, walk: random.Random) -> bytes:
    data = bytearray(raw)
    at, kind = walk.randrange(len(data) + 1), walk.randrange(4)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        del data[at : at + walk.choice((1, 2, 9))]
    elif kind == 2:
        data[at:at] = walk.choice(BYTES)
    elif data:
        data[at % len(data)] = walk.randrange(256)
    return bytes(data)


def _other_values(raw: bytes, keys: tuple[str, ...], walk: random.Random) -> bytes:
    try:
        whole = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    inner = whole
    while isinstance(inner, dict) and (deeper := [v for v in inner.values() if isinstance(v, dict | list) and v]) and walk.random() < 0.4:
        inner = walk.choice(deeper)
    if not isinstance(inner, dict | list):
        return json.dumps(walk.choice(ODD)).encode()
    places = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    kind = walk.randrange(5)
    if kind == 0 and places:
        del inner[walk.choice(places)]
    elif kind == 1 and isinstance(inner, dict):
        inner[walk.choice(keys)] = walk.choice(ODD)
    elif kind == 2 and isinstance(inner, list):
        inner[:] = (inner * walk.choice((0, 2, 1000)))[:5000]
    elif places:
        inner[walk.choice(places)] = walk.choice(ODD)
    return _dumped(whole)


def _dumped(whole) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(whole).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def _tiny_model(folder: Path) -> None:
    """None; `folder` holds a Llama of one layer that CONFIG describes."""
    at = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (24, 8), "model.norm.weight": (8,), f"{at}input_layernorm.weight": (8,),
              f"{at}post_attention_layernorm.weight": (8,), f"{at}self_attn.q_proj.weight": (8, 8), f"{at}self_attn.k_proj.weight": (4, 8), f"{at}self_attn.v_proj.weight": (4, 8),
              f"{at}self_attn.o_proj.weight": (8, 8), **{f"{at}mlp.{name}_proj.weight": (8, 8) for name in ("gate", "up", "down")}}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _read_config(folder: Path, raw: bytes) -> None:
    (folder / "config.json").write_bytes(raw)
    account(folder)
    hash(load_model(str(folder)).cfg)


def _read_generation_config(folder: Path, raw: bytes) -> None:
    (folder / "generation_config.json").write_bytes(raw)
    account(folder)
    SamplingParams(**own_sampling(load_model(str(folder)).generation_config))


def _wholes(*values) -> tuple[bytes, ...]:
    return tuple(json.dumps(value, indent=1).encode() for value in values)


TARGETS = {
    "config": Target(_wholes(*CONFIGS), (*FIELDS, *ROPE_FIELDS, *CHANGING), _tiny_model, _read_config),
    "generation_config": Target(_wholes(GENERATION), (*GENERATION_FIELDS, *GENERATION_CHANGING), _tiny_model, _read_generation_config),
}


def findings(name: str, count: int, seed: int, first: int = 0) -> list[str]:
    """What went wrong in cases `first` to `first + count` of a target; each has a generator of its own, so that one can be run alone."""
    target, found = TARGETS[name], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        target.prepare(folder)
        target.read(folder, target.wholes[0])
        for case in range(first, first + count):
            raw = mutated(target, random.Random(f"{name} {seed} {case}"))
            started = time.monotonic()
            wrong = _wrong(target, folder, raw)
            seconds = time.monotonic() - started
            if wrong is None and seconds > SECONDS:
                wrong = f"{seconds:.1f} s"
            if wrong is not None:
                found.append(f"{name} seed {seed} case {case}: {wrong}; {raw[:300]!r}")
    return found


def _wrong(target: Target, folder: Path, raw: bytes) -> str | None:
    try:
        target.read(folder, raw)
    except JaxllmError as error:
        text = str(error)
        printable = text.isprintable() and text.encode("utf-8", "replace").decode() == text
        return None if printable and len(text) <= LETTERS else f"an error of {len(text)} letters or several lines: {text[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return None


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
        found = findings(name, args.count, args.seed, args.first)
        print(f"{name}: {args.count} cases in {time.monotonic() - started:.0f} s, {len(found)} findings")
        for line in found:
            print(f"  {line}")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
