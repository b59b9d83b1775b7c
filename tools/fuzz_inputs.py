"""Mutated input files, each of which must give an answer or a one-line error within a second.

    JAX_PLATFORMS=cpu python tools/fuzz_inputs.py [TARGET ...] [--count 10000] [--seed 0]

A target is a function in TARGETS: given an empty folder, it returns examples of the file's content (JSON values) and a
function that takes the bytes of a mutated one to wherever a user's would go.
"""
import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxllm.errors import JaxllmError  # noqa: E402
from tests.tiny import make_folder  # noqa: E402

SECONDS = 1.0
STRANGE = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, -2**63, 10**30,
    "", "a", " ", "\n", "\0", "é日本😀", "\ud83d", "0", "true", "null", "<s>", "<|end|>", "../x", "a" * 10_000,
    "{{ x", "{% for i in range(10) %}{{ i }}{% endfor %}",
    [], {}, [[]], [None], [1, "a"], ["a"] * 300, {"content": "a"}, {"content": None}, {"": 0}, {"a": {"a": {"a": []}}}, {"1": 1},
    [{"role": "user", "content": "a"}], {"text": "a", "type": "text"},
]


def mutated(draw: random.Random, example) -> bytes:
    """The JSON of the example with one or two changes to its values or keys, and sometimes to its bytes."""
    value = copy.deepcopy(example)
    for _ in range(draw.choice([1, 1, 2])):
        value = _changed(draw, value)
    data = json.dumps(value).encode()
    if draw.random() < 0.1:
        at, end = sorted(draw.choices(range(len(data) + 1), k=2))
        noise = draw.randbytes(draw.randint(1, 4))
        data = draw.choice([data[:at], data[:at] + noise + data[at:], data[:at] + data[end:], data[:end] + data[at:]])
    return data


def _changed(draw: random.Random, value):
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return copy.deepcopy(draw.choice(STRANGE))
    if isinstance(value, list):
        at = draw.randrange(len(value))
        new = draw.choice([[], [value[at]] * 2, None])
        return [*value[:at], *([_changed(draw, value[at])] if new is None else new), *value[at + 1:]]
    key = draw.choice(list(value))
    how = draw.random()
    if how < 0.1:
        return {k: v for k, v in value.items() if k != key}
    if how < 0.2:
        other = draw.choice(["", "a", "0", "-1", "messages", "prompt", key.upper()])
        return {(other if k == key else k): v for k, v in value.items()}
    return {**value, key: _changed(draw, value[key])}


def tokenizer_config(folder: Path):
    """A tokenizer's settings: read, a text there and back, and a conversation through whatever template there is."""
    from jaxllm.text.tokenizer import load_tokenizer
    make_folder(folder)
    token = {"content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    named = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": {"__type": "AddedToken", **token}, "image_token": "<img>"}
    flags = {"add_prefix_space": False, "split_special_tokens": False, "legacy": False, "add_bos_token": True, "model_max_length": 256}
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    several = [{"name": "default", "template": chat}, {"name": "tool_use", "template": "{{ tools }}"}]
    examples = [{"tokenizer_class": "PreTrainedTokenizerFast", **named, **flags, "chat_template": chat, "extra_special_tokens": ["<x>"]},
                {"tokenizer_class": "Qwen2Tokenizer", **named, "chat_template": several, "extra_special_tokens": {"x_token": "<x>"},
                 "additional_special_tokens": ["<y>"]},
                {"tokenizer_class": "LlamaTokenizer", "chat_template": chat, "added_tokens_decoder": {"256": token}}]

    def attempt(data: bytes):
        (folder / "tokenizer_config.json").write_bytes(data)
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("hello <x> é"))
        tokenizer.apply_chat([{"role": "user", "content": "hello"}])
    return examples, attempt


def prompts(folder: Path):
    """A line of a prompts file, and generation from it with the lengths cut short."""
    from jaxllm import LLM
    from jaxllm.commands.generate import _prompt_of, as_json
    from jaxllm.prompts import read_prompts, sampling_of
    model = make_folder(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}))
    llm = LLM(model, load_format="dummy", max_num_seqs=4, max_num_batched_tokens=32)
    file = folder / "prompts.jsonl"
    sampling = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 1, "seed": 3, "max_tokens": 2, "min_tokens": 1, "stop": ["a"],
        "stop_token_ids": [7], "bad_words": ["b"], "logit_bias": {"5": 1.5}, "allowed_token_ids": list(range(40)), "logprobs": 1,
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "prompt_logprobs": 1, "ignore_eos": False,
        "skip_special_tokens": True, "detokenize": True}
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    examples = ["hello", {"prompt": "hello", **sampling}, {"prompt_token_ids": [1, 2, 3], "max_tokens": 2, "stop": "b"},
                {"messages": messages, "max_tokens": 2}]

    def attempt(data: bytes):
        file.write_bytes(data)
        lines = read_prompts(str(file))
        params = [sampling_of(line, {}) for line in lines]
        for p in params:
            p.n, p.max_tokens, p.min_tokens = min(p.n, 4), min(p.max_tokens or 2, 2), min(p.min_tokens, 2)
        for index, result in enumerate(llm.generate([_prompt_of(llm, line) for line in lines], params)):
            json.dumps(as_json(index, result))
    return examples, attempt


TARGETS = {"tokenizer_config": tokenizer_config, "prompts": prompts}


def fuzz(target: Callable, count: int, seed: int, folder: Path) -> Iterator[tuple[bytes, str | None, str]]:
    """(input, its error or None, what is wrong with that or "") for each of `count` mutated inputs."""
    examples, attempt = target(folder)
    for example in examples:
        attempt(json.dumps(example).encode())  # an example that is refused would make the test of its mutations an empty one
    draw = random.Random(seed)
    for _ in range(count):
        data = mutated(draw, draw.choice(examples))
        for again in (False, True):  # the first may compile
            start, error, wrong = time.monotonic(), None, ""
            try:
                attempt(data)
            except JaxllmError as e:
                error = str(e)
                wrong = "the error has several lines" if "\n" in error else ""
            except Exception as e:  # what the shell would report as a fault of the program
                error, wrong = f"{type(e).__name__}: {e}", "no error of ours"
            took = time.monotonic() - start
            if took < SECONDS:
                break
            wrong = wrong or (f"{took:.1f} s" if again else "")
        yield data, error, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = 0
    for name in args.targets or TARGETS:
        answers = refused = 0
        with tempfile.TemporaryDirectory() as folder:
            for data, error, wrong in fuzz(TARGETS[name], args.count, args.seed, Path(folder)):
                answers, refused, failed = answers + (error is None), refused + (error is not None), failed + bool(wrong)
                if wrong:
                    print(f"{name}: {wrong}: {error}\n    {data!r:.400}")
        print(f"{name}: {args.count} inputs, {answers} answers, {refused} errors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
