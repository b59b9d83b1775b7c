"""The start-up proof at the front door: what a machine does not keep is mended, or said everywhere and refused when asked to be strict."""
import jax
import pytest

from jaxllm import LLM, SamplingParams, machine
from jaxllm.engine import batch as batches
from jaxllm.engine import proof
from jaxllm.errors import UnsupportedError
from pallas_kernels import forms, reference
from tests.kernels.test_probe import in_halves
from tests.test_reproducible import bits
from tests.tiny import VOCAB, make_folder

LIMITS = dict(load_format="dummy", max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
GREEDY = SamplingParams(max_tokens=4, temperature=0, logprobs=0, ignore_eos=True, seed=1)
PROMPTS = [{"prompt_token_ids": [i, 2 * i, 7]} for i in range(1, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing traced before or inside is used on the other side."""
    jax.clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


def test_a_function_that_depends_on_the_number_of_rows_is_found_and_said(folder, fresh, caplog):
    """What no probe of sums looks at: an elementwise function that rounds otherwise where one row runs."""
    silu = reference.ACTIVATIONS["silu"]
    fresh.setitem(reference.ACTIVATIONS, "silu", lambda x: silu(x) * (1 + 2**-20) if x.shape[0] == 1 else silu(x))
    with LLM(folder, compile_cache_dir="off", **LIMITS) as llm:
        assert llm.reproducible, "nothing has run"
        answers = llm.generate(PROMPTS, GREEDY) + llm.generate(PROMPTS[:1], GREEDY)
        assert not llm.reproducible and "steps of 1 tokens" in llm.unproven[0]
        assert "NOT REPRODUCIBLE" in caplog.text and llm.unproven[0] in caplog.text
        assert llm.fingerprint_parts["reproducible"] == f"no: {'; '.join(llm.unproven)}"
        assert [a.reproducible for a in answers] == [True] * 3 + [False] and answers[0].system_fingerprint != answers[3].system_fingerprint
    with pytest.raises(UnsupportedError, match="strict.*steps of 2 tokens"):
        LLM(folder, compile_cache_dir="off", reproducible="strict", **LIMITS)


def test_a_sum_that_differs_is_named(folder, fresh, caplog):
    norm = reference.log_sum_exp
    fresh.setattr(reference, "log_sum_exp", lambda x: norm(x) + (1e-3 if x.shape[0] == 2 else 0))
    from pallas_kernels import dispatch
    dispatch.reference_kernels.cache_clear()
    try:
        with LLM(folder, compile_cache_dir="off", **LIMITS) as llm:
            llm.generate(PROMPTS[:1], GREEDY)
            llm.generate(PROMPTS[:2], GREEDY)
            assert llm.unproven == ["draws of 2 rows (log_sum_exp)"]
    finally:
        dispatch.reference_kernels.cache_clear()


def test_a_library_that_changes_behind_the_probe_costs_safer_forms_and_no_bit(folder, fresh):
    four, limits = PROMPTS + [{"prompt_token_ids": [9, 9, 9, 9]}], LIMITS | {"max_num_seqs": 8}
    with LLM(folder, compile_cache_dir="off", **limits) as llm:
        want = [bits(o) for o in llm.generate(four, GREEDY)]
        found = llm.kernels.forms
    jax.clear_caches()
    true = forms.library
    fresh.setattr(forms, "library", lambda a, b: (in_halves(true) if min(a.shape[0], b.shape[0]) == 4 else true)(a, b))
    fresh.setattr(machine, "forms", lambda *_: found)  # what was found before the library changed
    fresh.setattr(machine, "facts", lambda _: machine.Facts(None))
    with LLM(folder, compile_cache_dir="off", **limits) as llm:
        assert [bits(o) for o in llm.generate(four, GREEDY)] == want and llm.unproven == []
        assert llm._runner._safer and all(decode for _, decode in llm._runner._safer)


def test_what_was_proven_is_remembered_for_this_machine_and_shape_alone(folder, tmp_path):
    for comparisons, options in ((True, {}), (False, {}), (True, {"dtype": "bfloat16"}), (True, {"hf_overrides": {"intermediate_size": 128}})):
        with LLM(folder, compile_cache_dir=tmp_path, **LIMITS, **options) as llm:
            llm.generate(PROMPTS, GREEDY)
            llm.generate(PROMPTS[:1], GREEDY)
            assert (llm.proof_comparisons > 0) == comparisons, options
    (tmp_path / "facts.json").write_text("{ damaged")
    machine._facts.cache_clear()
    with LLM(folder, compile_cache_dir=tmp_path, **LIMITS) as llm:
        assert llm.generate(PROMPTS[:1], GREEDY)[0].reproducible


@pytest.mark.parametrize("tokens, decode, seqs", [(1, True, 8), (2, True, 8), (8, True, 8), (16, False, 8), (16, False, 1), (64, False, 2), (64, False, 64)])
def test_a_proofs_step_is_a_step_that_an_engine_could_run(tokens, decode, seqs):
    from jaxllm.config import EngineConfig
    config = EngineConfig(max_model_len=48, max_num_seqs=seqs, max_num_batched_tokens=64, num_pages=3 * seqs)
    batch, places = proof.forward_batch(tokens, decode, config, VOCAB)
    shape = batches.padding(tokens, decode, config)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), batch) == jax.tree.map(lambda a: (a.shape, a.dtype), shape)
    assert 0 in places and len(set(places.values())) == len(places) == min(3, len(batch.ragged.kv_len), len(proof.subjects(config, VOCAB)))
    live = batch.ragged.slots[batch.ragged.slots < config.cache_pages * config.page_size]
    assert (live >= config.num_pages * config.page_size).all() and len(set(live)) == len(live) == len(places)
    assert batch.ragged.block_tables.max() < config.cache_pages and batch.ragged.block_tables.min() >= config.num_pages
    assert batch.ragged.kv_len.max() <= config.max_model_len and (0 <= batch.tokens).all() and (batch.tokens < VOCAB).all()


def test_options_that_contradict_each_other_are_refused(folder):
    from jaxllm.errors import UsageError
    for options in ({"portable": True, "dtype": "bfloat16"}, {"portable": True, "reproducible": False}, {"reproducible": "maybe"}):
        with pytest.raises(UsageError, match="portable|reproducible"):
            LLM(folder, **LIMITS, **options)


def test_a_portable_llm_says_so_and_keeps_its_bits(folder):
    with LLM(folder, portable=True, **LIMITS) as llm:
        assert llm.kernels.forms.law == forms.Law(512, True) and "chains of 512" in llm.fingerprint_parts["sums"]
        together = [bits(o) for o in llm.generate(PROMPTS, GREEDY)]
        assert together == [bits(llm.generate(p, GREEDY)[0]) for p in PROMPTS]
        import jaxllm
        ids = llm.generate(PROMPTS[0], GREEDY)[0]
        plain = jaxllm.logprobs(llm, ids.prompt_token_ids + ids.outputs[0].token_ids)
        assert [float(x) for x in plain[-4:]] == [row[t].logprob for t, row in zip(ids.outputs[0].token_ids, ids.outputs[0].logprobs)]
