"""R6, tried: the float32 bits of one processor, held against those of this one.

`golden.json` holds hashes of logit rows, of the built-in model and of two odd shapes, in the portable order of sums, and of single
operations, with the processor that they were made on. `python -m jaxllm.golden` makes it anew.
"""
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import machine
from jaxllm.sampling_params import SamplingParams
from pallas_kernels import forms, reference

FILE = Path(__file__).with_name("golden.json")
ODD = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
       "hidden_act": "silu", "dtype": "float32"}
MODELS = {  # name -> config.json of random weights; None: a model that is here
    "builtin:tales": None,
    "width 576, as many kv heads as heads": ODD | {"vocab_size": 300, "hidden_size": 576, "intermediate_size": 1100, "num_attention_heads": 6,
                                                   "num_key_value_heads": 6, "head_dim": 96, "tie_word_embeddings": True},
    "width 2100, head_dim 80, one kv head": ODD | {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 515, "hidden_size": 2100,
                                                   "intermediate_size": 700, "num_attention_heads": 3, "num_key_value_heads": 1,
                                                   "head_dim": 80, "tie_word_embeddings": False}}
PROMPTS = [[5], [7, 8, 9] * 5, [(i * 37) % 250 for i in range(150)]]  # the last is longer than a split of attention


def _operations():
    """{name: function of float32 numbers}: what a model is made of, but for its products."""
    return {"exp": jnp.exp, "log": jnp.log, "sin": jnp.sin, "cos": jnp.cos, "tanh": jnp.tanh, "sqrt": jnp.sqrt,
            "rms_norm": lambda x: reference.rms_norm(x, jnp.ones(x.shape[-1]), 1e-5), "log_sum_exp": reference.log_sum_exp,
            **{name: function for name, function in reference.ACTIVATIONS.items()}}


def operations() -> dict[str, str]:
    """The hash of each operation's bits on fixed numbers, and of the portable product's."""
    numbers = jnp.asarray(np.random.Generator(np.random.Philox(1)).integers(-8000, 8000, (101, 577)).astype(np.float32) / 512)
    options = forms.CONSISTENT
    run = lambda function, *args: np.asarray(jax.jit(function, compiler_options=options)(*args))
    out = {"weights": _hash(np.random.Generator(np.random.Philox(0)).standard_normal(4096, dtype=np.float32))}
    for name, function in _operations().items():
        out[name] = _hash(run(function, jnp.abs(numbers) + 0.01 if name in ("log", "sqrt") else numbers))
    law = forms.Law(512, True)
    for name, form in forms.FORMS.items():
        if name not in ("stream", "passes"):
            out[f"product, {name}"] = _hash(run(lambda x, w: form(x, w, law), numbers[:8], numbers[8:]))
    out["product, stream"] = _hash(run(lambda x, w: forms.stream(x, w, law), numbers[:1], numbers[8:100]))
    return out


def _hash(a: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(a).tobytes(), digest_size=8).hexdigest()


def models(compile_cache_dir=None) -> Iterator[tuple[str, list[str]]]:
    """(name, hashes of logit rows in the order drawn) of each model in float32 and the portable order."""
    from jaxllm.llm import LLM
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logits_digest=True, detokenize=False)
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            if config:
                (Path(folder) / "config.json").write_text(json.dumps(config))
            with LLM(folder if config else name, dtype="float32", load_format="dummy" if config else "auto", portable=True,
                     skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64,
                     compile_cache_dir=compile_cache_dir) as llm:
                outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params)
            yield name, [digest for o in outputs for digest in o.outputs[0].logits_digests]


def compare(compile_cache_dir=None) -> dict:
    """What is equal here to `golden.json`: {"made_on", "equal": bool, "models": {name: bool}, "operations": the names that differ}."""
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    here = operations()
    same = {name: rows == golden["models"][name] for name, rows in models(compile_cache_dir)}
    return {"made_on": golden["processor"], "equal": all(same.values()), "models": same,
            "operations": [name for name, value in golden["operations"].items() if here.get(name) != value]}


if __name__ == "__main__":
    FILE.write_text(json.dumps({"processor": machine.processor(), "jax": jax.__version__, "operations": operations(),
                                "models": dict(models())}, indent=1) + "\n", encoding="utf-8")
