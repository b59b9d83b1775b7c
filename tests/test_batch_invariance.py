"""R2, parameter by parameter: each request alone and among 1, 7, 31 and 255 others, streamed and not, cached and not."""
import dataclasses
import random

import pytest

from jaxllm import LLM, SamplingParams
from tests.test_reproducible import FAMILIES, folder  # noqa: F401  (folder is a fixture)
from tests.test_reproducible import bits as reported
from tests.tiny import VOCAB

COMMON = {"max_tokens": 6, "logprobs": 2, "ignore_eos": True, "temperature": 0.9}
SUBJECTS = {  # of each sampling parameter, a value that changes what is drawn or reported
    "greedy": {"temperature": 0}, "temperature": {"temperature": 1.7}, "top_p": {"top_p": 0.7}, "top_k": {"top_k": 5}, "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.8}, "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5}, "logit_bias": {"logit_bias": {7: 4.0, 8: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(0, VOCAB, 7))}, "bad_words": {"bad_words": ["a", "th"]},
    "min_tokens": {"min_tokens": 4, "ignore_eos": False, "logit_bias": {256: 30.0}},
    "stop_token_ids": {"stop_token_ids": list(range(0, VOCAB, 3))}, "stop": {"stop": ["e", "o"], "include_stop_str_in_output": True},
    "n": {"n": 3}, "seed": {"seed": 1234}, "logprobs": {"logprobs": -1}, "prompt_logprobs": {"prompt_logprobs": 2},
    "logits_digest": {"logits_digest": True},
    "all": {"top_p": 0.8, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.3,
            "logit_bias": {9: 2.0}, "prompt_logprobs": 0, "n": 2, "logits_digest": True},
}
# Not of the draw: they say how ids become text.
FORMATTING = {"detokenize", "skip_special_tokens", "spaces_between_special_tokens", "max_tokens", "ignore_eos", "include_stop_str_in_output"}


def bits(output):
    """All that a request reports, whole rows of logits too where it asked."""
    return (*reported(output), [o.logits_digests for o in output.outputs])


def test_every_sampling_parameter_has_a_subject():
    fields = {f.name for f in dataclasses.fields(SamplingParams)} - FORMATTING
    assert fields == {name for p in SUBJECTS.values() for name in p} - FORMATTING


def requests():
    """[(prompt, params)] of the subjects, prompts of all lengths around a page and some with a common prefix."""
    rng = random.Random(5)
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    out = []
    for i, p in enumerate(SUBJECTS.values()):
        prompt = (shared if i % 3 == 0 else []) + [rng.randrange(VOCAB) for _ in range((1, 15, 16, 17, 33)[i % 5])]
        out.append(({"prompt_token_ids": prompt}, SamplingParams(**{**COMMON, "seed": i, **p})))
    return out


def neighbours(count, rng):
    return [({"prompt_token_ids": [rng.randrange(VOCAB) for _ in range(rng.choice([1, 9, 20]))]},
             SamplingParams(max_tokens=rng.choice([1, 3, 8]), temperature=rng.choice([0, 1.0]), top_k=rng.choice([0, 9]), ignore_eos=True))
            for _ in range(count)]


def in_company(llm, subjects, size, rng):
    """The bits of the subjects, each in a call of `size` requests, at a random place of it."""
    out = []
    for start in range(0, len(subjects), size):
        part = subjects[start:start + size]
        crowd = [(None, r) for r in neighbours(size - len(part), rng)] + list(enumerate(part))
        rng.shuffle(crowd)
        answers = llm.generate([p for _, (p, _) in crowd], [s for _, (_, s) in crowd])
        found = {i: bits(a) for (i, _), a in zip(crowd, answers) if i is not None}
        out += [found[i] for i in range(len(part))]
    return out


# Every size in one dtype; in the others the crowd and one that is computed by another schedule, since each size compiles anew.
@pytest.mark.parametrize("family, dtype, sizes", [
    ("llama", "float32", (2, 8, 32, 256)), ("qwen3", "bfloat16", (8, 256)), ("qwen2", "float16", (32,)), ("mistral", "bfloat16", (2, 32))])
def test_a_request_is_the_same_alone_and_among_others(folder, family, dtype, sizes):  # noqa: F811
    subjects, rng = requests(), random.Random(7)
    with LLM(folder, load_format="dummy", dtype=dtype, hf_overrides=FAMILIES[family], max_num_seqs=256, max_num_batched_tokens=512,
             max_model_len=96) as llm:
        alone = in_company(llm, subjects, 1, rng)
        for size in sizes:
            for name, a, b in zip(SUBJECTS, alone, in_company(llm, subjects, size, rng), strict=True):
                assert a == b, f"{name} among {size - 1} others"


def test_streaming_and_the_prefix_cache_change_nothing(folder):  # noqa: F811
    subjects = requests()
    prompts, params = [p for p, _ in subjects], [s for _, s in subjects]
    with LLM(folder, load_format="dummy", max_num_seqs=8, max_model_len=96) as llm:
        cold = llm.generate(prompts, params)
        texts = {}

        def on_delta(output, choice, delta):
            texts[output.request_id, choice] = texts.get((output.request_id, choice), "") + delta

        warm = llm.generate(prompts, params, on_delta=on_delta)
        assert sum(o.num_cached_tokens for o in warm) > sum(o.num_cached_tokens for o in cold)
        assert [bits(o) for o in warm] == [bits(o) for o in cold]
        assert [texts[o.request_id, c.index] for o in warm for c in o.outputs] == [c.text for o in cold for c in o.outputs]


@pytest.mark.parametrize("choice", [0, 2])
def test_a_choice_that_is_left_alone_draws_what_it_draws_beside_its_siblings(folder, choice):  # noqa: F811
    ids, params = [5, 6, 7], SamplingParams(n=4, max_tokens=8, temperature=1.0, seed=3, logprobs=0, ignore_eos=True)
    with LLM(folder, load_format="dummy", max_num_seqs=8, max_model_len=96) as llm:
        want = llm.generate({"prompt_token_ids": ids}, params)[0].outputs[choice]
        engine, request = llm._engine, llm._request("alone", "0", ids, params)
        engine.add(request)
        for other in set(range(4)) - {choice}:
            engine.stop("alone", other)
        events = []
        while engine.busy:
            events += [e for e in engine.step() if e.choice == choice]
        assert [e.token for e in events] == want.token_ids
        assert [e.logprobs.logprob for e in events] == [row[t].logprob for t, row in zip(want.token_ids, want.logprobs)]


def test_prompt_logprobs_do_not_change_the_draw(folder):  # noqa: F811
    prompt = {"prompt_token_ids": list(range(50))}
    with LLM(folder, load_format="dummy", max_num_seqs=4, max_model_len=96) as llm:
        with_, without = llm.generate([prompt, prompt], [SamplingParams(**COMMON, seed=1, prompt_logprobs=p) for p in (3, None)])
        assert bits(with_)[:2] == bits(without)[:2] and with_.prompt_logprobs and not without.prompt_logprobs


def test_a_fast_llm_gives_the_promise_up_and_says_so(folder):  # noqa: F811
    subjects = [({"prompt_token_ids": [i] * 20}, SamplingParams(max_tokens=4, temperature=0, logprobs=0, ignore_eos=True)) for i in range(9)]
    with LLM(folder, load_format="dummy", max_num_seqs=16, max_model_len=96) as llm:
        default = [bits(o) for o in llm.generate([p for p, _ in subjects], [s for _, s in subjects])]
        with LLM(folder, params=llm.params, reproducible=False, max_num_seqs=16, max_model_len=96) as fast:
            assert fast.params is llm.params
            assert fast.system_fingerprint != llm.system_fingerprint and fast.fingerprint_parts["kernels"] == "reference+fast"
            together = [bits(o) for o in fast.generate([p for p, _ in subjects], [s for _, s in subjects])]
            alone = in_company(fast, subjects, 1, random.Random(0))
        assert llm.params is not None
    assert together != alone, "if XLA's own products kept the bits, there would be nothing to give up"
    for mine, theirs in zip(default, together):  # float32: the same model, sums in another order
        assert [row[0][1] for row in mine[1][0][2]] == pytest.approx([row[0][1] for row in theirs[1][0][2]], abs=1e-4)


def test_given_weights_must_be_those_of_the_model(folder):  # noqa: F811
    from jaxllm.errors import UsageError
    with LLM(folder, load_format="dummy", max_num_seqs=4, max_model_len=96) as llm:
        for params, options, said in ((llm.params, {"dtype": "bfloat16"}, "dtype"), ([1, 2], {}, "load_params"),
                                      (llm.params, {"hf_overrides": {"num_hidden_layers": 1}}, "differs")):
            with pytest.raises(UsageError, match=said):
                LLM(folder, params=params, max_model_len=96, **options)
