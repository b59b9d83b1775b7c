"""Whatever is raised inside a call, and wherever: the LLM is whole afterwards and gives the bits of one that was left alone."""
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.proof import Proof
from jaxllm.errors import UsageError
from jaxllm.fingerprint import content_hash
from jaxllm.machine import Facts
from tests.tiny import make_folder

LONG = list(range(40, 75))  # more than two pages, and more than one step's tokens
PROMPTS = [LONG, [*LONG[:33], 7, 8], [5, 6, 7]]
PARAMS = [SamplingParams(max_tokens=4, temperature=0, logprobs=1, ignore_eos=True),
          SamplingParams(max_tokens=3, temperature=0.9, logprobs=0, repetition_penalty=1.2, ignore_eos=True),
          SamplingParams(max_tokens=2, temperature=1.0, n=2, prompt_logprobs=0, stop=["zzzz"], ignore_eos=True)]
OPTIONS = dict(load_format="dummy", max_num_seqs=3, max_num_batched_tokens=16, max_model_len=64, kv_cache_memory_bytes=2 * 2 * 16 * 32 * 4 * 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **OPTIONS) as llm:
        wrap(llm)
        yield llm


def wrap(llm):
    """The compiled programs as functions of this file: their return is a boundary where what they were given is gone already."""
    real = llm._runner._programs

    def forward(*args):
        return real.forward(*args)

    def draw(*args, **static):
        return real.draw(*args, **static)

    llm._runner._programs = dataclasses.replace(real, forward=forward, draw=draw)
    llm._runner.compiled_programs = dict


def on_delta(output, choice, delta):
    """A caller's own function, which may raise as well."""


def answers(llm, prompts=PROMPTS, params=PARAMS):
    return [[(o.token_ids, o.text, o.finish_reason, o.logprobs) for o in out.outputs] + [out.prompt_logprobs]
            for out in llm.generate([{"prompt_token_ids": p} for p in prompts], params, on_delta=on_delta)]


OURS = ("/jaxllm/engine/", "/jaxllm/llm.py", "tests/engine/test_faults.py", "contextlib.py")


def raising_at(number, error):
    """A trace function that counts calls, lines and returns in our code, and raises at the given one."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not any(part in frame.f_code.co_filename for part in OURS):
            return None
        count += 1
        if count == number:
            raise error(f"at {frame.f_code.co_name}:{frame.f_lineno} {event}")
        return trace

    return trace, lambda: count


def traced(trace, run):
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return run()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("points", [100, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised where a generator is dropped, it is lost
def test_an_exception_at_any_point_costs_its_call_and_nothing_else(llm, points):
    """So many points, spread evenly over all calls, lines and returns of a call; None: each of them."""
    want = answers(llm)
    llm.reset_prefix_cache()
    trace, count = raising_at(0, None)
    assert traced(trace, lambda: answers(llm)) == want
    total = count()
    assert total > 3000
    for number in range(1, total, total // points if points else 1):
        error = (KeyboardInterrupt, RuntimeError, MemoryError)[number % 3]
        llm.reset_prefix_cache()
        trace, _ = raising_at(number, error)
        try:
            traced(trace, lambda: answers(llm))
        except error as e:
            where = f"{number}: {error.__name__} {e}"
        else:
            where = f"{number}: not reached"
        assert answers(llm) == want, where
        engine = llm._engine
        assert not engine.busy and not engine.sequences and not engine.inboxes and engine.in_flight is None, where
        engine.scheduler.check()
        llm.update_params(llm.params, version="the same")


def test_two_interrupts_one_while_the_other_is_undone(llm):
    want = answers(llm)
    llm.reset_prefix_cache()
    renew = llm._runner.renew

    def interrupted():
        raise KeyboardInterrupt

    def build(*_):
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._runner, "renew", interrupted)
        patch.setattr("jaxllm.engine.runner.batches.build", build)
        with pytest.raises(KeyboardInterrupt):
            answers(llm)
    assert llm._runner.renew == renew and answers(llm) == want


def test_pages_that_were_planned_and_not_written_are_not_found_again(llm):
    llm.reset_prefix_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._runner, "forward", lambda plan: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answers(llm)
    assert llm.generate(LONG, PARAMS[0])[0].num_cached_tokens == 0


def test_the_scratch_pages_of_the_proof_come_back_with_the_cache(folder):
    with LLM(folder, **OPTIONS, compile_cache_dir="off") as llm:
        before = jax.tree.map(np.asarray, llm._runner.cache)
        llm._runner.renew()
        jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, llm._runner.cache))


def test_an_exception_in_the_middle_of_a_proof_proves_nothing():
    facts, runs = Facts(None), []
    bits = {"alone": {0: b"a"}, "more": {0: b"a", 1: b"b"}, "wrong": {0: b"a", 1: b"c"}}

    def run(program):
        runs.append(program)
        if interrupted:
            raise KeyboardInterrupt
        return bits[program]

    proof, interrupted = Proof(facts, ["here"]), True
    for program in ("alone", "more"):
        with pytest.raises(KeyboardInterrupt):
            proof.differing("kind", program, run)
    interrupted = False

    class Torn(dict):
        def __ror__(self, other):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after it was run, before that is kept
        proof.differing("kind", "alone", lambda program: Torn(bits[program]))
    assert facts._known == {} and proof.differing("kind", "alone", run) == []
    assert facts._known == {}, "a program that was compared with none, or with itself, is not shown"
    assert proof.differing("kind", "wrong", run) == [] and proof.differing("kind", "more", run) == [1]


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["stop token", "stop text", "on_delta", "length", "step"])
def test_weights_can_be_swapped_after_any_end(llm, ending):
    prompt = {"prompt_token_ids": [5, 6, 7]}
    full = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))[0].outputs[0]
    more = {"stop token": dict(stop_token_ids=[full.token_ids[3]]), "stop text": dict(stop=[full.text[2:4]])}.get(ending, {})
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, **more)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if ending == "step":
            patch.setattr(llm._runner, "read", fail)
        if ending in ("step", "on_delta"):
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompt, params, on_delta=fail)
        else:
            assert llm.generate(prompt, params)[0].outputs[0].finish_reason == ("length" if ending == "length" else "stop")
    llm.update_params(llm.params, version=ending)
    assert llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))[0].outputs[0].token_ids == full.token_ids
    assert llm.fingerprint_parts["weights"] == ending


def test_old_weights_are_freed_by_a_swap_and_all_by_close(folder):
    held = lambda: sum(a.nbytes for a in jax.live_arrays())  # noqa: E731
    before = held()
    llm = LLM(folder, **OPTIONS)
    llm.generate("hello", PARAMS[0])
    size, opened = sum(a.nbytes for a in jax.tree.leaves(llm.params)), held()
    for _ in range(2):
        llm.update_params(jax.tree.map(lambda a: a * 1, llm.params))
    assert held() - opened < size / 2
    llm.close()
    assert held() - before < size / 2
    for use in (lambda: llm.generate("a"), llm.warmup, lambda: llm.update_params({})):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_arrays_of_numpy_are_copied_and_arrays_that_hold_nothing_are_refused(folder):
    with LLM(folder, **OPTIONS) as llm:
        want, host = answers(llm), jax.tree.map(np.array, llm.params)
        llm.update_params(host)
        jax.tree.map(lambda a: a.fill(0), host)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(llm.params)) and answers(llm) == want
        with LLM(folder, params=jax.tree.map(np.asarray, llm.params), **OPTIONS) as twin:
            assert isinstance(twin.params.norm, jax.Array) and answers(twin) == want
        gone = jax.tree.map(lambda a: a * 1, llm.params)
        gone.norm.delete()
        with pytest.raises(UsageError, match=r"norm is deleted.*update_params"):
            llm.update_params(gone)
        with pytest.raises(UsageError, match=r"embedding is traced.*update_params"):
            jax.jit(llm.update_params)(llm.params)
        with pytest.raises(UsageError, match="pytree of arrays"):
            llm.update_params([1, 2])
        assert answers(llm) == want
        mine = jax.tree.map(lambda a: a * 1, llm.params)
        llm.update_params(mine)
        jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)(mine)  # a trainer's next step
        with pytest.raises(UsageError, match=r"deleted.*donated.*update_params"):
            llm.generate("a")
        llm.update_params(jax.tree.map(jnp.asarray, host))
        assert llm.generate("a", PARAMS[0])[0].finished


@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache")
def test_a_cache_folder_that_cannot_be_written_costs_no_answer(folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("weights")
    assert content_hash([blocked], blocked / "folder" / "weights.json") == content_hash([blocked])
    with LLM(folder, **OPTIONS, compile_cache_dir=blocked / "folder") as llm:
        assert llm.generate("Once", SamplingParams(max_tokens=2))[0].system_fingerprint.startswith("jaxllm-")
