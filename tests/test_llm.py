"""The Python door: forms of prompts, parameters, outputs under vLLM's names, and that the user's process is left as it was."""
import datetime
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.errors import CapacityError, CheckpointError, UnsupportedError, UsageError
from tests.tiny import VOCAB, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, load_format="dummy", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm


def greedy(n=5, **more):
    return SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, **more)


def letters(llm, n, **more):
    """Random letters, always the same ones: a text with something to find in it."""
    allowed = llm.get_tokenizer().encode("abcdefghijklmnopqrstuvwxyz")
    return SamplingParams(max_tokens=n, temperature=1.0, seed=4, allowed_token_ids=allowed, **more)


def test_every_form_of_a_prompt_gives_the_same_answer(llm):
    ids = llm.get_tokenizer().encode("hello")
    forms = ["hello", ["hello"], {"prompt": "hello"}, [{"prompt_token_ids": ids}], ids, [ids]]
    outputs = [llm.generate(form, greedy()) for form in forms]
    assert all(len(o) == 1 and o[0].outputs[0].token_ids == outputs[0][0].outputs[0].token_ids for o in outputs)
    assert outputs[0][0].prompt == "hello" and outputs[3][0].prompt is None
    assert outputs[0][0].prompt_token_ids == ids and outputs[0][0].finished


def test_arrays_are_token_ids_and_bytes_are_not(llm):
    ids = llm.get_tokenizer().encode("hello")
    want = llm.generate(ids, greedy())[0].outputs[0].token_ids
    arrays = [np.array(ids), np.array(ids, np.uint8), jnp.array(ids)]
    forms = [*arrays, *({"prompt_token_ids": a} for a in arrays), [np.int64(i) for i in ids], list(jnp.array(ids)), tuple(ids), [np.array(ids)],
             np.array([ids]), jnp.array([ids]), (p for p in ["hello"])]
    for form in forms:
        out, = llm.generate(form, greedy())
        assert out.outputs[0].token_ids == want and all(type(i) is int for i in out.prompt_token_ids), form
    for form in (b"hello", [b"hello"], bytearray(b"hello"), np.array([1.5]), np.array([True]), [1, "a"], [[1, "a"]], {"prompt_token_ids": "ab"},
                 {"prompt_token_ids": {1: 2}}, np.zeros((1, 1, 1), int), [None], None, 3, object(), {"prompt": b"a"}):
        with pytest.raises(UsageError):
            llm.generate(form, greedy())


def test_parameters_may_be_arrays_and_are_pythons_own_afterwards(llm):
    params = SamplingParams(allowed_token_ids=np.array([5, 6]), stop_token_ids=jnp.array([7, 7]), temperature=np.float32(0.5), n=np.int64(2),
                            top_k=jnp.array(3), logit_bias={np.int64(5): np.float32(1), "6": 2}, seed=np.uint32(7), max_tokens=np.int32(3), ignore_eos=np.bool_(True))
    assert params == SamplingParams(allowed_token_ids=[5, 6], stop_token_ids=[7], temperature=0.5, n=2, top_k=3, logit_bias={5: 1.0, 6: 2.0},
                                    seed=7, max_tokens=3, ignore_eos=True)
    assert {type(v) for v in (params.n, params.seed, params.top_k, *params.allowed_token_ids, *params.logit_bias)} == {int}
    assert {t for o in llm.generate("a", params)[0].outputs for t in o.token_ids} <= {5, 6}
    with pytest.raises(UsageError, match="sampling_params is a dict"):
        llm.generate(["a"], {"max_tokens": 1})
    with pytest.raises(UsageError, match="sampling_params"):
        llm.generate(["a"], ["x"])


def test_parameters_can_be_changed_and_cloned_and_are_checked_when_used(llm):
    params = greedy(5)
    other = params.clone()
    other.max_tokens, other.stop = 2, ["x"]
    assert (params.max_tokens, params.stop) == (5, [])
    assert len(llm.generate("hello", other)[0].outputs[0].token_ids) == 2
    other.temperature = -1
    with pytest.raises(UsageError, match="temperature=-1"):
        llm.generate("hello", other)
    with pytest.raises(UsageError, match=r"sampling_params\[1\]: temperature=-1"):
        llm.generate(["a", "b"], [params, other])
    with pytest.raises(AttributeError):
        params.temprature = 1
    hot = SamplingParams(temperature=50.0, max_tokens=3, ignore_eos=True)  # above 2, as vLLM allows
    assert len(llm.generate("hello", hot)[0].outputs[0].token_ids) == 3


def test_text_that_is_none_is_refused_by_its_place(llm):
    for prompt, words in ((["fine", "a\ud83d"], r"prompts\[1\]: the prompt: character 1 is U\+D83D"), ("\udcff", "character 0")):
        with pytest.raises(UsageError, match=words):
            llm.generate(prompt, greedy())
    for fields in (dict(bad_words=["\ud83d"]), dict(stop=["ab\ud83d"])):
        with pytest.raises(UsageError, match="U\\+D83D"):
            SamplingParams(**fields)
    with pytest.raises(UsageError, match="surrogate"):
        llm.chat([{"role": "user", "content": "\ud83d"}], greedy(), chat_template="{{ messages[0].content }}")


def test_an_error_about_one_of_many_names_which(llm):
    for prompts, words in ((["a", "x" * 300], r"prompts\[1\]: .*300 tokens"), ([[1], [2], [VOCAB]], r"prompts\[2\]: "), (["a", 3], r"prompts\[1\]: ")):
        with pytest.raises(UsageError, match=words):
            llm.generate(prompts, greedy())
    with pytest.raises(UsageError, match=r"prompts\[1\]: stop_token_ids"):
        llm.generate(["a", "b"], [greedy(), greedy(stop_token_ids=[VOCAB])])
    with pytest.raises(UsageError, match=r"messages\[1\]: messages\[0\]"):
        llm.chat([[{"role": "user", "content": "a"}], [{"content": "a"}]], greedy(), chat_template="x")


def test_an_end_token_has_no_stop_reason_and_a_stop_token_has(folder, llm):
    def end(llm, **more):
        out = llm.generate("hello", SamplingParams(max_tokens=4, temperature=0, logit_bias={256: 100}, **more))[0].outputs[0]
        return out.token_ids, out.finish_reason, out.stop_reason
    assert end(llm) == ([256], "stop", None)
    assert end(llm, stop_token_ids=[256], ignore_eos=True) == ([256], "stop", 256)
    assert end(llm, ignore_eos=True) == ([256] * 4, "length", None)
    with LLM(folder, load_format="dummy", max_num_seqs=2, max_num_batched_tokens=16, hf_overrides={"eos_token_id": 7}) as other:
        assert end(other) == ([256], "stop", None)  # the tokenizer's, beside that of config.json
        assert other.generate("a", SamplingParams(logit_bias={7: 100}))[0].outputs[0].token_ids == [7]


@pytest.mark.parametrize("dtype, name", [("half", "float16"), ("float", "float32"), (jnp.bfloat16, "bfloat16"), (np.dtype("float32"), "float32"), (np.float16, "float16")])
def test_dtypes_have_several_names(folder, dtype, name):
    with LLM(folder, load_format="dummy", max_num_seqs=2, max_num_batched_tokens=16, dtype=dtype) as llm:
        assert str(llm.params.embedding.dtype) == name


def test_results_come_in_the_order_of_the_prompts_whoever_ends_first(llm):
    outputs = llm.generate(["a", "b", "c"], [greedy(9), greedy(1), greedy(4)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 4]
    assert [o.prompt for o in outputs] == ["a", "b", "c"]
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}


def test_logprobs_hold_the_drawn_token_and_the_likeliest(llm):
    out = llm.generate("hello", SamplingParams(max_tokens=4, temperature=1.5, logprobs=3, prompt_logprobs=2, ignore_eos=True))[0]
    choice = out.outputs[0]
    assert len(choice.logprobs) == 4
    for token, table in zip(choice.token_ids, choice.logprobs):
        assert token in table and len(table) in (3, 4)
        ranks = sorted(lp.rank for lp in table.values())
        assert ranks[:3] == [1, 2, 3]
        assert list(table)[0] == token
    assert choice.cumulative_logprob == pytest.approx(sum(t[i].logprob for i, t in zip(choice.token_ids, choice.logprobs)))
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == 5
    assert all(token in table for token, table in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:]))


def test_all_logprobs_sum_to_one(llm):
    table = llm.generate("hello", greedy(1, logprobs=-1))[0].outputs[0].logprobs[0]
    assert len(table) == VOCAB
    assert sum(np.exp(lp.logprob) for lp in table.values()) == pytest.approx(1, abs=1e-5)  # float32 sums of 300 terms


def test_prompt_logprobs_are_those_of_the_same_tokens_when_generated(llm):
    out = llm.generate("abc", greedy(6, logprobs=0))[0]
    ids = out.prompt_token_ids + out.outputs[0].token_ids
    again = llm.generate({"prompt_token_ids": ids}, greedy(1, prompt_logprobs=0))[0]
    generated = [table[t].logprob for t, table in zip(out.outputs[0].token_ids, out.outputs[0].logprobs)]
    assert [again.prompt_logprobs[i + 3][t].logprob for i, t in enumerate(out.outputs[0].token_ids)] == generated


def test_choices_differ_and_the_seed_replays_them(llm):
    params = SamplingParams(max_tokens=8, n=3, temperature=1.0, ignore_eos=True)
    first, second = llm.generate(["hello", "hello"], params)
    assert len({tuple(o.token_ids) for o in first.outputs + second.outputs}) == 6
    assert [o.index for o in first.outputs] == [0, 1, 2]
    replay = llm.generate("hello", SamplingParams(max_tokens=8, n=3, temperature=1.0, ignore_eos=True, seed=second.seed))[0]
    assert [o.token_ids for o in replay.outputs] == [o.token_ids for o in second.outputs]


def test_choices_of_a_seeded_request_and_unseeded_requests_of_a_call_differ(llm):
    drawn = SamplingParams(max_tokens=8, n=8, temperature=1.0, ignore_eos=True, seed=3)
    assert len({tuple(o.token_ids) for o in llm.generate("hello", drawn)[0].outputs}) == 8
    outputs = llm.generate(["hello"] * 8, SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True))
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == len({o.seed for o in outputs}) == 8


def test_a_stop_text_ends_the_choice_and_is_cut_off(llm):
    text = llm.generate("hello", letters(llm, 12))[0].outputs[0].text
    stop = text[5:7]
    out = llm.generate("hello", letters(llm, 12, stop=stop))[0].outputs[0]
    assert out.text == text[:text.index(stop)] and out.finish_reason == "stop" and out.stop_reason == stop
    kept = llm.generate("hello", letters(llm, 12, stop=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == text[:text.index(stop)] + stop
    for stop in (text[:2], text[1:4], text[3:5]):  # found though a longer stop text than the text so far is on the list
        kept = llm.generate("hello", letters(llm, 12, stop=[stop, "a text that never comes"], include_stop_str_in_output=True))[0].outputs[0]
        assert (kept.text, kept.stop_reason) == (text[:text.index(stop)] + stop, stop)


def test_a_stop_token_ends_the_choice_and_is_not_part_of_the_text(llm):
    full = llm.generate("hello", letters(llm, 8))[0].outputs[0]
    token = full.token_ids[3]
    at = full.token_ids.index(token)
    out = llm.generate("hello", letters(llm, 8, stop_token_ids=[token]))[0].outputs[0]
    assert out.token_ids == full.token_ids[:at + 1] and out.stop_reason == token and out.finish_reason == "stop"
    assert out.text == llm.get_tokenizer().decode(full.token_ids[:at])
    late = llm.generate("hello", letters(llm, 8, stop_token_ids=[token], min_tokens=6))[0].outputs[0]
    assert token not in late.token_ids[:6]


def test_bad_words_are_not_written(llm):
    full = llm.generate("hello", letters(llm, 10))[0].outputs[0]
    word = llm.get_tokenizer().decode(full.token_ids[2:4])
    out = llm.generate("hello", letters(llm, 10, bad_words=[word]))[0].outputs[0]
    assert word not in out.text and out.token_ids[:3] == full.token_ids[:3]


def test_max_tokens_none_fills_the_context(llm):
    out = llm.generate("hello", SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))[0].outputs[0]
    assert len(out.token_ids) + 5 == llm.config.max_model_len and out.finish_reason == "length"


def test_deltas_join_to_the_text(llm):
    seen = {}
    out = llm.generate(["one", "two"], greedy(6), on_delta=lambda o, i, d: seen.__setitem__(o.prompt, seen.get(o.prompt, "") + d))
    assert seen == {o.prompt: o.outputs[0].text for o in out}


def test_a_second_request_finds_the_prefix_of_the_first(llm):
    prompt = list(range(100, 150))
    llm.reset_prefix_cache()
    assert llm.generate(prompt, greedy(1))[0].num_cached_tokens == 0
    assert llm.generate(prompt + [7], greedy(1))[0].num_cached_tokens == 48


def test_an_interrupted_call_leaves_nothing_behind(llm):
    def stop(*_):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], greedy(20), on_delta=stop)
    assert not llm._engine.sequences and llm._engine.scheduler.idle
    assert llm.generate("a", greedy(3))[0].finished


def test_digests_of_whole_rows_come_to_those_who_ask_and_are_those_of_the_plain_function(llm):
    from jaxllm.engine.runner import own_configuration
    from jaxllm.engine.sampler import row_digests
    from jaxllm.models import decoder
    asks = SamplingParams(max_tokens=6, temperature=1.0, n=2, logits_digest=True, ignore_eos=True)
    asking, plain, stopped = llm.generate(["hello", "hello", "hello"], [asks, greedy(), letters(llm, 60, stop=["e"], logits_digest=True)])
    assert [o.logits_digests for o in plain.outputs] == [None]
    for out in (*asking.outputs, *stopped.outputs):
        ids = stopped.prompt_token_ids + out.token_ids

        def rows(params):
            hidden = decoder.whole(llm.model_config, params, np.asarray([ids]), kernels=llm.kernels)[0]
            return row_digests(decoder.unembed(llm.model_config, params, hidden, kernels=llm.kernels))

        with own_configuration():
            want = np.asarray(jax.jit(rows)(llm.params))[len(stopped.prompt_token_ids) - 1:-1]
        assert out.logits_digests == [f"{a:08x}{b:08x}" for a, b in want]
    assert stopped.outputs[0].stop_reason == "e" and stopped.outputs[0].logprobs is None


@pytest.mark.parametrize("name", ["logits_digest", "ignore_eos", "detokenize"])
def test_a_flag_is_true_or_false(name):
    with pytest.raises(UsageError, match=f"{name}='false'; it must be true or false"):
        SamplingParams(**{name: "false"})


@pytest.mark.parametrize("name,value", [
    ("stop", 3), ("stop", {"a": 1}), ("stop", [3]), ("bad_words", 1.5), ("stop_token_ids", 3), ("stop_token_ids", ["a", 1]),
    ("stop_token_ids", [[1]]), ("allowed_token_ids", 3), ("allowed_token_ids", "12"), ("logit_bias", [1]), ("logit_bias", 3)])
def test_a_list_or_a_table_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})


DATED = ("{% macro today() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}"
         "{% if messages[0].role == 'user' %}{{ today() }}|{% endif %}{{ messages[0].content }}")


def test_the_date_that_a_chat_template_reads_is_an_input_and_comes_back(llm):
    ask = lambda *roles, **kwargs: llm.chat([[{"role": role, "content": "hi"}] for role in roles], greedy(2), chat_template=DATED,
                                            chat_template_kwargs=kwargs)
    text = lambda out: llm.get_tokenizer().decode(out.prompt_token_ids)
    first, silent, third = ask("user", "system", "user", chat_date="2031-05-04T03:02:01")
    assert text(first) == "04 May 2031 03:02|hi" == text(third) and first.chat_date == "2031-05-04T03:02:01" == third.chat_date
    assert text(silent) == "hi" and silent.chat_date is None
    before = datetime.datetime.now()
    one, other = ask("user", "user")
    assert before <= datetime.datetime.fromisoformat(one.chat_date) <= datetime.datetime.now() and one.chat_date == other.chat_date
    assert ask("user", chat_date=one.chat_date)[0].prompt_token_ids == one.prompt_token_ids
    day = datetime.date(2020, 2, 29)
    assert text(ask("user", chat_date=day)[0]) == "29 Feb 2020 00:00|hi"
    assert ask("user", chat_date=day, strftime_now=lambda form: "never")[0].chat_date is None
    for wrong in ("yesterday", 7, "2031-13-01"):
        with pytest.raises(UsageError, match="chat_date=.*ISO 8601"):
            ask("user", chat_date=wrong)


def test_chat_template_kwargs_go_before_chats_own_options(llm):
    template = "{{ add_generation_prompt }}{{ messages[0].content }}"
    ask = lambda **kwargs: llm.chat([{"role": "user", "content": "hi"}], greedy(1), chat_template=template, chat_template_kwargs=kwargs)[0]
    assert llm.get_tokenizer().decode(ask(add_generation_prompt=False).prompt_token_ids) == "Falsehi"
    with pytest.raises(UsageError, match="messages"):
        ask(messages=[])


@pytest.mark.parametrize("draws", ["{{ messages | random }}", "{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_a_chat_template_that_draws_at_random_is_refused(llm, draws):
    with pytest.raises(UsageError, match="draws at random"):
        llm.chat([{"role": "user", "content": "hi"}], greedy(1), chat_template=draws)


def test_chat_needs_a_template_and_messages(llm):
    with pytest.raises(UsageError, match="template"):
        llm.chat([{"role": "user", "content": "hi"}])
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    out = llm.chat([{"role": "user", "content": "hi"}], greedy(2), chat_template=template)[0]
    assert llm.get_tokenizer().decode(out.prompt_token_ids) == "[user]hi[assistant]"
    with pytest.raises(UsageError, match="messages is empty"):
        llm.chat([])


def test_chat_takes_parts_documents_and_several_conversations_and_bounds_the_template(llm):
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}{{ documents[0].title }}{{ mood }}"
    talk = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    more = {"chat_template": template, "chat_template_kwargs": {"documents": [{"title": "T"}], "mood": "!"}}
    outputs = llm.chat([talk, talk], greedy(1), **more)
    assert [llm.get_tokenizer().decode(o.prompt_token_ids) for o in outputs] == ["a|b|T!"] * 2
    with pytest.raises(CapacityError, match="chat template"):
        llm.chat(talk, greedy(1), chat_template="{{ 'a' * 2000000000 }}")


@pytest.mark.parametrize("prompt,message", [("", "empty"), ([], None), ({"prompt_token_ids": []}, "empty"), ([VOCAB], "0 to 299"),
                                            ({"text": "x"}, "prompt_token_ids"), ("x" * 300, "300 tokens"), (3.5, None)])
def test_a_prompt_that_cannot_run_is_refused(llm, prompt, message):
    if prompt == []:
        assert llm.generate(prompt, greedy()) == []
    elif prompt == 3.5:
        with pytest.raises((UsageError, TypeError)):
            llm.generate(prompt, greedy())
    else:
        with pytest.raises(UsageError, match=message):
            llm.generate(prompt, greedy())


def test_one_bad_prompt_stops_the_call_before_any_work(llm):
    before = llm._engine.steps
    with pytest.raises(UsageError):
        llm.generate(["fine", "x" * 300], greedy())
    assert llm._engine.steps == before and not llm._engine.busy


@pytest.mark.parametrize("fields", [
    dict(n=0), dict(temperature=-1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=0), dict(top_p=1.1), dict(top_k=-2),
    dict(min_p=2), dict(max_tokens=0), dict(min_tokens=5, max_tokens=2), dict(repetition_penalty=0), dict(presence_penalty=3),
    dict(frequency_penalty=-3), dict(stop=[""]), dict(logprobs=-2), dict(seed=2**63), dict(n=2, temperature=0), dict(allowed_token_ids=[]),
    dict(logit_bias={"x": 1}), dict(stop="x", detokenize=False), dict(n=True), dict(top_k=1.5)])
def test_parameters_out_of_range_are_refused_by_name(fields):
    with pytest.raises(UsageError) as e:
        SamplingParams(**fields)
    assert e.value.param in fields and e.value.exit_status == 2


@pytest.mark.parametrize("fields", [dict(logprobs=21), dict(stop_token_ids=[VOCAB]), dict(logit_bias={VOCAB: 1}), dict(allowed_token_ids=[VOCAB])])
def test_parameters_the_model_cannot_meet_are_refused(llm, fields):
    with pytest.raises(UsageError):
        llm.generate("a", SamplingParams(**fields))


@pytest.mark.parametrize("options,error", [
    (dict(max_model_len=100_000_000), CapacityError), (dict(dtype="int8"), UsageError), (dict(load_format="gguf"), UsageError),
    (dict(page_size=7), UsageError), (dict(seed=2**63), UsageError), (dict(gpu_memory_utilization=0), UsageError),
    (dict(hf_overrides={"architectures": ["MambaForCausalLM"]}), UnsupportedError), (dict(max_num_seqs=0), UsageError),
    (dict(hf_overrides={"quantization_config": {"quant_method": "awq"}}), UnsupportedError),
    (dict(hf_overrides={"rope_scaling": {"rope_type": "longrope"}}), UnsupportedError), (dict(kernels="cuda"), UsageError),
    (dict(max_num_seqs=32, max_num_batched_tokens=16), UsageError)])
def test_options_that_cannot_be_met_are_refused(folder, options, error):
    with pytest.raises(error):
        LLM(folder, **{"load_format": "dummy", **options})


def test_a_folder_without_weights_or_config_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError):
        LLM(folder)
    with pytest.raises(CheckpointError, match="config.json"):
        LLM(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM(str(tmp_path / "absent"))


def test_the_users_random_state_and_configuration_are_left_alone(folder):
    def state():
        names = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision", "jax_compilation_cache_dir",
                 "jax_numpy_dtype_promotion", "jax_default_prng_impl", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
        return random.getstate(), str(np.random.get_state()), [getattr(jax.config, n) for n in names]
    before = state()
    with LLM(folder, load_format="dummy", max_num_seqs=2, max_num_batched_tokens=16) as llm:
        llm.generate("hello", SamplingParams(max_tokens=3))
    assert state() == before


@pytest.mark.parametrize("setting", [dict(jax_enable_x64=True), dict(jax_threefry_partitionable=False), dict(jax_default_matmul_precision="bfloat16"),
                                     dict(jax_numpy_rank_promotion="raise"), dict(jax_numpy_dtype_promotion="strict"), dict(jax_debug_nans=True)])
def test_the_users_configuration_does_not_change_the_answer(llm, folder, setting):
    params = SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, logprobs=1, ignore_eos=True)
    expected = llm.generate("hello", params)[0].outputs[0]
    (name, value), = setting.items()
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with LLM(folder, load_format="dummy", max_num_seqs=8, max_num_batched_tokens=64) as other:
            got = other.generate("hello", params)[0].outputs[0]
    finally:
        jax.config.update(name, before)
    assert got.token_ids == expected.token_ids and got.logprobs == expected.logprobs


def test_the_number_of_compiled_programs_is_bounded_whatever_the_load(folder):
    """Decode shapes + prefill shapes, a sum and not a product; draws by rows and features."""
    rng = random.Random(0)
    with LLM(folder, load_format="dummy", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        for _ in range(6):
            prompts = [[rng.randrange(256) for _ in range(rng.randrange(1, 120))] for _ in range(rng.randrange(1, 20))]
            llm.generate(prompts, [greedy(rng.randrange(1, 12)) for _ in prompts])
        programs = llm._runner.compiled_programs()
        assert programs["forward"] <= 4 + 3  # rows 1, 2, 4, 8 and tokens 16, 32, 64
        assert programs["draw"] <= 4 and programs["score"] == 0  # rows 1, 2, 4, 8


def test_warmup_compiles_all_that_a_greedy_or_sampled_load_needs(folder):
    with LLM(folder, load_format="dummy", max_num_seqs=4, max_num_batched_tokens=32) as llm:
        count = llm.warmup()
        llm.generate([[1] * 50, [2] * 3, [3]], SamplingParams(max_tokens=5, top_p=0.9))
        llm.generate([[1] * 9], greedy())
        assert sum(llm._runner.compiled_programs().values()) == count


def test_closing_twice_is_fine_and_using_a_closed_llm_says_so(folder):
    llm = LLM(folder, load_format="dummy", max_num_seqs=2, max_num_batched_tokens=16)
    llm.close()
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        llm.generate("a")
