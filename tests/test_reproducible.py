"""R1 and R2: a request's tokens and logprob bits under random schedules, and a negative control that must be caught."""
import dataclasses
import json
import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.errors import UsageError
from pallas_kernels import dispatch, reference
from tests.tiny import CONFIG, VOCAB, make_folder

FAMILIES = {
    "llama": {},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 20},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 80},
}
PAGE_BYTES = 2 * CONFIG["num_hidden_layers"] * 16 * CONFIG["num_key_value_heads"] * CONFIG["head_dim"]  # times the dtype's size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


def workload(seed, count=9):
    """Prompts, some of which share a prefix, and parameters of every kind."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(70)]
    requests = []
    for i in range(count):
        prompt = shared[:rng.randrange(71)] if rng.random() < 0.4 else []
        prompt = prompt + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 15, 16, 17, 40]))]
        p = {"max_tokens": rng.choice([1, 4, 12]), "logprobs": rng.choice([0, 2]), "ignore_eos": True}
        p["temperature"] = rng.choice([0, 0.6, 1.0, 1.4])
        if p["temperature"]:
            p |= {"seed": rng.choice([None, i]), "n": rng.choice([1, 1, 2]), "top_p": rng.choice([1, 0.9]), "top_k": rng.choice([0, 20])}
        for name, value in (("repetition_penalty", 1.3), ("presence_penalty", 0.5), ("frequency_penalty", 0.4), ("logit_bias", {5: 3.0}),
                            ("min_tokens", 3), ("prompt_logprobs", 1), ("allowed_token_ids", list(range(100)))):
            if rng.random() < 0.2 and p["max_tokens"] > 3:
                p[name] = value
        requests.append(({"prompt_token_ids": prompt}, SamplingParams(**p)))
    return requests


def schedule(seed, itemsize):
    """Engine limits drawn at random: among them a pool so small that sequences are preempted."""
    rng = random.Random(seed)
    return dict(max_num_seqs=rng.choice([3, 8]), max_num_batched_tokens=rng.choice([16, 64]),
                kv_cache_memory_bytes=PAGE_BYTES * itemsize * rng.choice([10, 14, 80]), enable_prefix_caching=rng.random() < 0.6,
                max_model_len=160)


def bits(output):
    """All that a request reports, floats exact."""
    return (output.seed, [(o.index, o.token_ids, [[(t, lp.logprob, lp.rank) for t, lp in row.items()] for row in o.logprobs], o.cumulative_logprob)
                          for o in output.outputs],
            output.prompt_logprobs and [row and [(t, lp.logprob) for t, lp in row.items()] for row in output.prompt_logprobs])


def run(folder, requests, **options):
    with LLM(folder, load_format="dummy", **options) as llm:
        outputs = llm.generate([p for p, _ in requests], [s for _, s in requests])
        return [bits(o) for o in outputs], llm._engine.scheduler.preemptions


def replay(folder, requests, seeds, order, at_a_time, **options):
    """The same requests in another order and company, each with the seed that its answer gave."""
    out = [None] * len(requests)
    with LLM(folder, load_format="dummy", **options) as llm:
        for start in range(0, len(order), at_a_time):
            part = order[start:start + at_a_time]
            answers = llm.generate([requests[i][0] for i in part], [dataclasses.replace(requests[i][1], seed=seeds[i]) for i in part])
            for i, answer in zip(part, answers):
                out[i] = bits(answer)
    return out


def compare(folder, seed, dtype, **overrides):
    """The numbers of the requests that two random schedules answer differently, and how often one of them preempted."""
    rng, itemsize = random.Random(seed), jnp.dtype(dtype).itemsize
    requests = workload(seed)
    common = dict(dtype=dtype, hf_overrides=overrides)
    first, preemptions = run(folder, requests, **schedule(rng.random(), itemsize), **common)
    order = rng.sample(range(len(requests)), len(requests))
    second = replay(folder, requests, [f[0] for f in first], order, rng.choice([1, 3, 9]), **schedule(rng.random(), itemsize), **common)
    return [i for i, (a, b) in enumerate(zip(first, second)) if a != b], preemptions


@pytest.mark.parametrize("family,dtype,seed", [("llama", "float32", 1), ("qwen2", "bfloat16", 2), ("qwen3", "float16", 3), ("mistral", "float32", 4)])
def test_a_request_has_the_same_bits_under_any_schedule(folder, family, dtype, seed):
    different, _ = compare(folder, seed, dtype, **FAMILIES[family])
    assert different == [], f"seed {seed}"


def test_preemption_changes_nothing(folder):
    requests = [({"prompt_token_ids": [i] * 30}, SamplingParams(max_tokens=60, temperature=1.0, logprobs=1, ignore_eos=True)) for i in range(6)]
    small, preemptions = run(folder, requests, max_num_seqs=8, kv_cache_memory_bytes=PAGE_BYTES * 4 * 10, max_model_len=160)
    roomy, none = run(folder, requests, max_num_seqs=8, max_model_len=160)
    assert preemptions > 0 and none == 0
    assert small == roomy


def test_a_broken_tree_is_caught(folder, monkeypatch):
    """A matrix product that sums in two halves when few rows run: what a kernel tuned to the batch does."""
    def tuned(x, w, bias=None, *, residual=None, out_dtype=None):
        if x.shape[0] > 4:
            return reference.matmul(x, w, bias, residual=residual, out_dtype=out_dtype)
        half = x.shape[1] // 2
        parts = [reference.matmul(x[:, s], w[:, s], out_dtype=jnp.float32) for s in (slice(None, half), slice(half, None))]
        out = parts[0] + parts[1] + (0 if bias is None else bias) + (0 if residual is None else residual)
        return out.astype(out_dtype or x.dtype)

    broken = dataclasses.replace(dispatch.SERVING, matmul=tuned)
    monkeypatch.setattr(dispatch, "choose", lambda *a, **k: broken)
    requests = workload(1)
    together, _ = run(folder, requests, max_num_seqs=8, max_model_len=160)
    alone = replay(folder, requests, [t[0] for t in together], list(range(len(requests))), 1, max_num_seqs=8, max_model_len=160)
    assert sum(a != b for a, b in zip(together, alone)) > len(requests) // 2


def test_identical_requests_without_a_seed_differ_and_repeat(folder):
    requests = [({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=8, temperature=1.0, logprobs=0, ignore_eos=True))] * 3
    first, _ = run(folder, requests, max_num_seqs=4, max_model_len=64)
    again, _ = run(folder, requests, max_num_seqs=4, max_model_len=64)
    other, _ = run(folder, requests, max_num_seqs=4, max_model_len=64, seed=1)
    assert first == again
    assert len({str(f) for f in first + other}) == 5 or len({str(f) for f in first + other}) == 6


@pytest.mark.parametrize("family,dtype", [("llama", "float32"), ("qwen3", "bfloat16")])
def test_the_engines_logprobs_are_those_of_the_plain_function(folder, family, dtype):
    with LLM(folder, load_format="dummy", dtype=dtype, hf_overrides=FAMILIES[family], max_num_seqs=4, max_model_len=64) as llm:
        out = llm.generate("hello there", SamplingParams(max_tokens=30, temperature=1.0, logprobs=0, ignore_eos=True))[0]
        ids = out.prompt_token_ids + out.outputs[0].token_ids
        reported = [row[token].logprob for token, row in zip(out.outputs[0].token_ids, out.outputs[0].logprobs)]
        cfg, params = llm.model_config, llm.params
        plain = jaxllm.logprobs(llm, ids)
        assert [float(x) for x in plain[len(out.prompt_token_ids):]] == reported
        value, grads = jax.value_and_grad(lambda p: jaxllm.logprobs((cfg, p), ids).sum())(params)
        assert float(value) == float(plain.sum())
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)) and any(bool(g.any()) for g in jax.tree.leaves(grads))


def test_new_weights_are_served_without_a_recompile_and_without_old_prefixes(folder):
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)
    with LLM(folder, load_format="dummy", max_num_seqs=4, max_model_len=64) as llm:
        first = llm.generate(list(range(40)), params)[0]
        programs, fingerprint = llm._runner.compiled_programs(), llm.system_fingerprint
        old = llm.params
        llm.update_params(jax.tree.map(lambda a: a * 1.25, old))
        second = llm.generate(list(range(40)), params)[0]
        assert second.num_cached_tokens == 0 and second.outputs[0].cumulative_logprob != first.outputs[0].cumulative_logprob
        assert llm.system_fingerprint != fingerprint
        llm.update_params(old)
        assert bits(llm.generate(list(range(40)), params)[0]) == bits(first)
        assert llm._runner.compiled_programs() == programs
        with pytest.raises(UsageError, match="shapes"):
            llm.update_params(jax.tree.map(lambda a: a.astype(jnp.bfloat16), old))


COMMAND = """
import json, sys
from jaxllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", max_num_seqs=4, max_num_batched_tokens=64)
out = llm.generate(["hello", "there", "you"], SamplingParams(max_tokens=8, temperature=0.8, top_p=0.95, logprobs=1, ignore_eos=True))
print(json.dumps([[o.token_ids, [[lp.logprob.hex() for lp in row.values()] for row in o.logprobs]] for r in out for o in r.outputs]))
"""


def test_processes_with_one_and_with_several_threads_give_the_same_bits(folder):
    """Each with a compilation cache of its own kind: what one compiled, the other may load."""
    runs = [subprocess.run([sys.executable, "-c", COMMAND, folder], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": str(i), "NPROC": str(i)}).stdout for i in (1, 2, 16)]
    assert runs[0] == runs[1] == runs[2] and len(json.loads(runs[0])) == 3


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two folders with the same weights: one of safetensors, one of a torch zip file."""
    from safetensors.numpy import save_file

    from tests.checkpoint.pickle_files import tensor, zip_file
    rng = np.random.default_rng(0)
    d, f, q, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 64, 32
    layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d),
             "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    shapes = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)} | {
        f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    state = {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    folders = [make_folder(tmp_path_factory.mktemp(kind) / "m") for kind in ("safetensors", "bin")]
    save_file(state, f"{folders[0]}/model.safetensors")
    stride = lambda shape: tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
    zip_file(f"{folders[1]}/pytorch_model.bin", {name: tensor(str(i), a.size, a.shape, stride(a.shape)) for i, (name, a) in enumerate(state.items())},
             {str(i): a.tobytes() for i, a in enumerate(state.values())})
    return folders


def test_containers_of_weights_and_weights_that_come_back_change_nothing(stored):
    requests = workload(3, count=4)
    answers = lambda llm: [bits(o) for o in llm.generate([p for p, _ in requests], [s for _, s in requests])]
    limits = dict(max_num_seqs=4, max_model_len=160)
    with LLM(stored[0], **limits) as llm:
        first, params = answers(llm), jax.tree.map(lambda a: np.array(a), llm.params)
        llm.update_params(jax.tree.map(lambda a: a * 0, llm.params))
        assert answers(llm) != first
        llm.update_params(jax.tree.map(jnp.asarray, params))  # as after a sleep, from the host
        assert answers(llm) == first
    with LLM(stored[1], **limits) as llm:
        assert answers(llm) == first
