"""One LLM and many callers: threads, an event loop, calls inside calls. Each gets the bits it gets alone, and nobody waits for ever."""
import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.errors import EndedError, UsageError
from tests.tiny import make_folder

SECONDS = 60  # until a thread is taken for hanging


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, load_format="dummy", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128) as llm:
        yield llm


def params(n=6, **more):
    return SamplingParams(max_tokens=n, temperature=0.9, logprobs=1, ignore_eos=True, **more)


def bits(outputs):
    return [[(o.token_ids, o.text, o.logprobs) for o in out.outputs] for out in outputs]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_a_call_inside_a_call_is_refused_by_name_and_the_outer_one_goes_on(llm):
    want, told = bits(llm.generate(["hi", "there"], params())), []

    def on_delta(output, choice, delta):
        for nested in (lambda: llm.generate("yo", params()), lambda: llm.chat([{"role": "user", "content": "yo"}], chat_template="x")):
            with pytest.raises(UsageError, match="generate or chat was called by the on_delta"):
                nested()
        if not output.outputs[choice].finished():
            with pytest.raises(UsageError, match="requests are running"):
                llm.update_params(llm.params)
        told.append(delta)

    assert bits(llm.generate(["hi", "there"], params(), on_delta=on_delta)) == want and told
    assert bits(llm.generate(["hi", "there"], params())) == want


def test_a_call_of_another_llm_inside_a_call_is_fine(llm, folder):
    with LLM(folder, params=llm.params, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128) as other:
        want, got = bits(llm.generate("yo", params())), []
        llm.generate("hi", params(2), on_delta=lambda *_: got.append(bits(other.generate("yo", params()))))
        assert got and all(one == want for one in got)


def test_calls_of_many_threads_have_the_bits_that_each_has_alone(llm, pool):
    calls = [(["hi", f"call {i}"], params(5 + i % 4)) for i in range(12)]
    want = [bits(llm.generate(*call)) for call in calls]
    started = threading.Barrier(4)

    def call(i):
        if i < 4:
            started.wait(SECONDS)
        return bits(llm.generate(*calls[i]))

    assert [f.result(SECONDS) for f in [pool.submit(call, i) for i in range(len(calls))]] == want
    assert not llm._engine.sequences and not llm._engine.inboxes
    llm._engine.scheduler.check()


def test_an_on_delta_may_wait_for_a_call_of_another_thread(llm, pool):
    want, got = bits(llm.generate("yo", params())), []

    def on_delta(output, choice, delta):
        got.append(bits(pool.submit(llm.generate, "yo", params()).result(SECONDS)))

    llm.generate("hi", params(3), on_delta=on_delta)
    assert got and all(one == want for one in got)


def test_calls_of_an_event_loop(llm):
    want = [bits(llm.generate(p, params())) for p in ("a", "b", "c")]

    async def main():
        together = await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(llm.generate, p, params()) for p in ("a", "b", "c"))), SECONDS)
        return [bits(out) for out in together], bits(llm.generate("b", params()))

    assert asyncio.run(main()) == (want, want[1])


def test_a_short_call_does_not_wait_for_a_long_one(llm, pool):
    ended, begun = [], threading.Event()

    def long():
        llm.generate("long", params(100), on_delta=lambda *_: begun.set())
        ended.append("long")

    running = pool.submit(long)
    assert begun.wait(SECONDS)
    llm.generate("short", params(2))
    ended.append("short")
    running.result(SECONDS)
    assert ended == ["short", "long"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_fails_for_one_caller_ends_the_calls_that_shared_it_and_none_after(llm, pool, error):
    want, begun, failed = bits(llm.generate("a", params())), threading.Event(), threading.Event()

    def other():
        def on_delta(*_):
            begun.set()
            failed.wait(SECONDS)
        return llm.generate("b", params(50), on_delta=on_delta)

    waiting = pool.submit(other)
    assert begun.wait(SECONDS)

    def fail(step):
        raise error("here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._runner, "read", fail)
        with pytest.raises(error):
            llm.generate("a", params())
    failed.set()
    with pytest.raises(EndedError, match=f"another call did not end \\({error.__name__}: here\\)"):
        waiting.result(SECONDS)
    assert bits(llm.generate("a", params())) == want


def test_what_one_callers_own_function_raises_is_theirs_alone(llm, pool):
    want, begun, failed = bits(llm.generate("b", params(20))), threading.Event(), threading.Event()

    def other():
        def on_delta(*_):
            begun.set()
            failed.wait(SECONDS)
        return bits(llm.generate("b", params(20), on_delta=on_delta))

    waiting = pool.submit(other)
    assert begun.wait(SECONDS)
    with pytest.raises(ZeroDivisionError):
        llm.generate("a", params(), on_delta=lambda *_: 1 / 0)
    failed.set()
    assert waiting.result(SECONDS) == want


@pytest.mark.parametrize("where", ["another thread", "on_delta"])
def test_closing_ends_the_calls_that_run(llm, folder, pool, where):
    other = LLM(folder, params=llm.params, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
    close = other.close if where == "on_delta" else lambda: pool.submit(other.close).result(SECONDS)
    with pytest.raises(EndedError, match="closed"):
        other.generate("a", params(50), on_delta=lambda *_: close())
    with pytest.raises(UsageError, match="closed"):
        other.generate("a")
    other.close()


def test_weights_are_not_changed_under_a_call_and_a_call_names_those_it_had(llm, pool):
    begun, updated = threading.Event(), threading.Event()

    def on_delta(*_):
        begun.set()
        updated.wait(SECONDS)

    before = llm.system_fingerprint
    waiting = pool.submit(llm.generate, "a", params(), on_delta=on_delta)
    assert begun.wait(SECONDS)
    with pytest.raises(UsageError, match="requests are running"):
        llm.update_params(llm.params, version="other")
    updated.set()
    assert waiting.result(SECONDS)[0].system_fingerprint == before == llm.system_fingerprint
    llm.update_params(llm.params, version="other")
    assert llm.generate("a", params())[0].system_fingerprint == llm.system_fingerprint != before
