"""A request whose next token cannot be drawn ends alone, with finish_reason "error" and why; its neighbours keep their bits."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.cli import main
from jaxllm.engine import batch, sampler
from jaxllm.engine.request import Fault
from jaxllm.record import entry, read_log, replay
from pallas_kernels.dispatch import SERVING
from tests.engine.test_sampler import CONFIG, V, rows
from tests.tiny import VOCAB, make_folder

POISON = 290  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, load_format="dummy", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64) as llm:
        poisoned = llm.params.embedding.at[POISON].set(jnp.nan)
        llm.update_params(dataclasses.replace(llm.params, embedding=poisoned), version="poisoned")
        yield llm


def greedy(n=6, **more):
    return SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, logprobs=1, **more)


def bits(out):
    return [(o.token_ids, o.text, o.finish_reason, o.error, o.logprobs) for o in out.outputs]


def faulty(llm):
    """{what is wrong: (prompt, params, tokens before the error, words of it)}."""
    third = llm.generate("abc", greedy())[0].outputs[0].token_ids[2]
    return {
        "bad word": ("abc", greedy(allowed_token_ids=[65], bad_words=["b"]), 0, ("allowed_token_ids with bad_words", "token 0 of the output")),
        "min_tokens": ("abc", SamplingParams(max_tokens=6, min_tokens=3, allowed_token_ids=[256]), 0, ("allowed_token_ids with min_tokens",)),
        "later": ("abc", greedy(allowed_token_ids=[65], bad_words=["bbb"]), 2, ("bad_words", "token 2 of the output")),
        "logits": ([1, 2, POISON, 3], greedy(), 0, ("not finite", "token 0 of the output")),
        "logits behind a mask": ([1, POISON], greedy(allowed_token_ids=[5, 6]), 0, ("not finite",)),
        "at random": ([1, POISON], SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, n=2), 0, ("not finite",)),
        "of the model's own making": ("abc", greedy(logit_bias={third: -100}, bad_words=[]), None, ()),
        "prompt": ([1, 2, POISON, 3, 4], greedy(prompt_logprobs=2), 0, ("not finite", "of the prompt")),
        "overflow": ("abc", greedy(repetition_penalty=1e-45, logit_bias={97: 100}), 0, ("repetition_penalty=1e-45",)),
    }


def test_a_request_that_cannot_go_on_ends_alone_and_says_why(llm):
    cases = faulty(llm)
    neighbours = [("hello", greedy(12)), ("there", SamplingParams(max_tokens=12, temperature=0.9, seed=3, logprobs=0)), ([1, 2, 3, 4], greedy(9))]
    want = [bits(llm.generate([p], [s])[0]) for p, s in neighbours]
    for name, (prompt, params, before, words) in cases.items():
        llm.reset_prefix_cache()
        out, *others = llm.generate([prompt, *[p for p, _ in neighbours]], [params, *[s for _, s in neighbours]])
        assert [bits(o) for o in others] == want, name
        for choice in out.outputs:
            if before is None:
                assert choice.finish_reason == "length" and choice.error is None
                continue
            assert choice.finish_reason == "error" and choice.stop_reason is None and out.finished, name
            assert len(choice.token_ids) == before == len(choice.logprobs or choice.token_ids), name
            assert all(word in choice.error for word in words) and "\n" not in choice.error, (name, choice.error)
    assert not llm._engine.busy and [bits(llm.generate([p], [s])[0]) for p, s in neighbours] == want


def test_a_later_request_does_not_find_the_keys_of_one_that_failed(llm):
    prefix = list(range(20))
    llm.reset_prefix_cache()
    want = bits(llm.generate([*prefix, 7], greedy())[0])
    llm.reset_prefix_cache()
    assert llm.generate([*prefix, POISON], greedy())[0].outputs[0].finish_reason == "error"
    assert bits(llm.generate([*prefix, 7], greedy())[0]) == want


def test_text_held_back_comes_with_the_error(llm):
    seen = []
    params = greedy(allowed_token_ids=[65], bad_words=["bbb"], stop=["bbc"])
    out = llm.generate("abc", params, on_delta=lambda o, i, delta: seen.append(delta))[0].outputs[0]
    assert out.text == "bb" == "".join(seen) and out.finish_reason == "error"


def test_a_bias_of_minus_infinity_is_the_least_bias_and_leaves_tokens(llm):
    bias = {token: float("-inf") for token in range(VOCAB)}
    out = llm.generate("abc", greedy(2, logit_bias=bias))[0].outputs[0]
    assert out.finish_reason == "length" and out.token_ids == llm.generate("abc", greedy(2))[0].outputs[0].token_ids


def test_a_log_holds_errors_and_replays_them(llm, tmp_path):
    cases = [(p, s) for p, s, before, _ in faulty(llm).values() if before is not None]
    params = [dataclasses.replace(s, logprobs=s.logprobs or 0, logits_digest=True) for _, s in cases]
    outputs = llm.generate([p for p, _ in cases], params)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(entry(i, llm, s, o), allow_nan=False) + "\n" for i, (s, o) in enumerate(zip(params, outputs))))
    entries, warnings = read_log(str(log))
    assert not warnings and {o["finish_reason"] for _, e in entries for o in e["outputs"]} == {"error"}
    for size in (1, len(entries)):
        assert all(all(c.equal.values()) for c in replay(llm, entries, batch_size=size, kinds=("tokens", "logprobs", "logits")))


def test_the_shell_says_it_and_writes_json(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "hi", "allowed_token_ids": [65], "bad_words": ["b"], "logprobs": 1}, {"prompt": "hi", "logprobs": 2}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["generate", "--prompts-file", str(prompts), "--model", folder, "--load-format", "dummy", "--max-tokens", "3",
              "--compile-cache-dir", str(tmp_path), "--record", str(tmp_path / "log")]
    assert main([*common, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert first["outputs"][0]["finish_reason"] == "error" and "bad_words" in first["outputs"][0]["error"]
    assert second["outputs"][0]["finish_reason"] == "length" and "error" not in second["outputs"][0]
    assert "jaxllm: error: prompt 1, choice 0: at token 0 of the output no token is left" in err
    assert main(["verify", str(tmp_path / "log"), "--model", folder, "--load-format", "dummy", "--compile-cache-dir", str(tmp_path)]) == 0


def faults_of(logits, *params):
    inputs, features = batch.sampling_inputs(rows(*params), *logits.shape, CONFIG)
    run = jax.jit(sampler.sample, static_argnames=("features", "kernels"))
    return np.asarray(run(jnp.asarray(logits), jnp.zeros(8, jnp.int32), inputs, features=features, kernels=SERVING)[0].faults).tolist()


@pytest.mark.parametrize("more", [{}, {"allowed_token_ids": [7, 8]}, {"logit_bias": {7: 1.0}}, {"temperature": 0.9, "top_p": 0.9}, {"logprobs": 2}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_logit_that_is_not_finite_is_found_wherever_it_stands(more, value):
    params = SamplingParams(**({"temperature": 0} | more))
    logits = np.random.default_rng(0).standard_normal((V + 2, V)).astype(np.float32)
    logits[np.arange(V), np.arange(V)] = value
    logits[V, :] = -np.inf
    logits[V + 1, 1:5] = -np.inf  # some are no fault
    assert faults_of(logits, *[params] * (V + 2)) == [Fault.LOGITS] * (V + 1) + [0]
