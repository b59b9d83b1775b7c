"""What a folder says counts by transformers' own precedence; what would change the answer and is not honoured is refused by name."""
import copy
import json
import logging
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from jaxllm import LLM, SamplingParams
from jaxllm.errors import CheckpointError, JaxllmError, UnsupportedError, UsageError
from jaxllm.fields import CHANGING, FIELDS, GENERATION_CHANGING, GENERATION_FIELDS
from jaxllm.layers.rope import rope_spec
from jaxllm.loading import account, load_model, own_sampling, read_config
from jaxllm.models.families import rope_parameters
from jaxllm.models.registry import FAMILIES, family

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128}
KINDS = {module: name for name, module in FAMILIES.items()}
YARN, PLAIN = {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "default", "rope_theta": 5e5}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def config(kind="llama", **changes):
    return {**BASE, "model_type": kind, "architectures": [KINDS[kind]], **changes}


def read(kind="llama", max_model_len=None, **changes):
    given = config(kind, **changes)
    return family(given).read_config(given, max_model_len)


def theirs(tmp_path, given):
    from transformers import AutoConfig
    (tmp_path / "config.json").write_text(json.dumps(given))
    return AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [
    {"rope_scaling": YARN}, {"rope_parameters": {**YARN, "rope_theta": 5e5}}, {"rope_parameters": PLAIN, "rope_scaling": YARN},
    {"rope_parameters": PLAIN, "rope_scaling": YARN, "rope_theta": 7e4}, {"rope_parameters": PLAIN, "rope_theta": 7e4},
    {"rope_parameters": {**YARN, "rope_theta": 5e5}, "rope_scaling": {}},
    {"rope_parameters": {**YARN, "rope_theta": 5e5}, "rope_scaling": None}, {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "original_max_position_embeddings": 64},
    {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 64}, {"rope_theta": 300.0},
    {"rope_scaling": YARN, "partial_rotary_factor": 0.5}, {}])
@pytest.mark.parametrize("kind", KINDS)
def test_rope_settings_are_those_that_transformers_reads(tmp_path, kind, changes):
    given = config(kind, **changes)
    them = theirs(tmp_path, given)
    them.standardize_rope_params()  # as the model does when it is built
    wanted = them.rope_parameters
    found = {"rope_type": "default", "original_max_position_embeddings": 128, **rope_parameters(given)}
    assert {name: found[name] for name in wanted if name != "type"} == {name: value for name, value in wanted.items() if name != "type"}


def test_a_base_that_rope_scaling_drops_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "jaxllm"):
        read(rope_parameters=PLAIN, rope_scaling=YARN)
    assert "rope_theta is 10000.0 and not 500000.0" in caplog.text


@pytest.mark.parametrize("file", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5},
                                  {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
                                  {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}])
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_overrides_of_the_rope_go_over_both_layouts_and_keep_the_base(tmp_path, file, layout):
    (tmp_path / "config.json").write_text(json.dumps(config(**file)))
    assert rope_parameters(read_config(tmp_path, {layout: YARN})) == {"partial_rotary_factor": 1.0, "rope_theta": 5e5, **YARN}
    assert rope_parameters(read_config(tmp_path, {layout: {**YARN, "rope_theta": 9.0}}))["rope_theta"] == 9.0
    assert rope_parameters(read_config(tmp_path, {"rope_theta": 9.0}))["rope_theta"] == 9.0
    off = rope_parameters(read_config(tmp_path, {layout: None}))
    assert off == {"partial_rotary_factor": 1.0, "rope_theta": 5e5}


TYPES = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("kind, changes", [
    ("mistral", {}), ("mistral", {"sliding_window": 8}), ("mistral", {"sliding_window": None}), ("mistral", {"layer_types": TYPES}),
    ("mistral", {"sliding_window": 8, "layer_types": TYPES}), ("mistral", {"sliding_window": 8, "layer_types": None}),
    ("mistral", {"sliding_window": None, "layer_types": TYPES}), ("llama", {"layer_types": ["full_attention"] * 2}),
    ("qwen2", {}), ("qwen2", {**WINDOW, "layer_types": TYPES}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {**WINDOW, "layer_types": ["attention", "sliding_attention"]}), ("qwen3", {**WINDOW, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 8})])
def test_each_layer_has_the_window_that_transformers_gives_it(tmp_path, kind, changes):
    """MistralForCausalLM with layer_types is read as Ministral there; without, one window is on every layer."""
    them = theirs(tmp_path, config(kind, **changes))
    kinds = getattr(them, "layer_types", None) or ["sliding_attention" if kind == "mistral" else "full_attention"] * 2
    wanted = [them.sliding_window if name == "sliding_attention" else None for name in kinds] if kind != "llama" else [None, None]
    assert [layer.window for layer in read(kind, **changes).layers] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_to_its_model_type_is_what_transformers_takes(tmp_path, kind):
    given = {name: value for name, value in config(kind, num_attention_heads=32, hidden_size=256).items()
             if name not in ("architectures", "max_position_embeddings", "num_key_value_heads")}
    cfg, them = family(given).read_config(given), theirs(tmp_path, given)
    assert cfg.architecture == KINDS[kind] and cfg.max_position == them.max_position_embeddings and cfg.num_kv_heads == them.num_key_value_heads
    assert cfg.head_dim == getattr(them, "head_dim", None) or them.hidden_size // them.num_attention_heads


@pytest.mark.parametrize("kind, changes, words", [
    ("llama", {"sliding_window": 8}, ["sliding_window is 8", "Llama"]), ("llama", {"sliding_window": 8, "layer_types": TYPES}, ["sliding_window"]),
    ("mistral", {"use_sliding_window": False, "sliding_window": 8}, ["use_sliding_window is false"]),
    ("mistral", {"attention_bias": True}, ["attention_bias", "MistralForCausalLM"]), ("qwen2", {"mlp_bias": True}, ["mlp_bias"]),
    ("qwen2", {"layer_types": TYPES, "sliding_window": 8}, ["layer_types", "use_sliding_window"]),
    ("llama", {"model_type": "mistral"}, ["LlamaForCausalLM", "mistral"]),
    ("llama", {"architectures": None, "model_type": "gpt2"}, ["gpt2", "LlamaForCausalLM"]),
    ("qwen2", {"rope_parameters": {"full_attention": YARN}}, ["full_attention", "layer type"]),
    ("llama", {"head_dim": 7}, ["pairs", "7"]), ("llama", {"rope_theta": 1e-300, "head_dim": 32}, ["not finite"]),
    ("llama", {"is_causal": False}, ["is_causal (False)"]), ("llama", {"per_layer_config": {"0": {}}}, ["per_layer_config"]),
    ("llama", {"logit_scale": 0.5, "num_experts": 8}, ["logit_scale (0.5)", "num_experts (8)"])])
def test_what_would_change_the_answer_is_refused_by_name(kind, changes, words):
    with pytest.raises(UnsupportedError) as caught:
        read(kind, **changes)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_what_would_change_nothing_is_taken():
    plain = read()
    assert read(use_cache=False, initializer_range="odd", pretraining_tp=2, unheard_of={"a": 1}, logit_scale=1.0, is_causal=True, num_experts=0,
                per_layer_config=None, no_rope_layers=[]) == plain
    assert read(sliding_window=128) == read(sliding_window=8, use_sliding_window=False) == plain
    with pytest.raises(UnsupportedError, match="sliding_window"):
        read(sliding_window=128, max_model_len=200)


BAD = {"an integer": [True, 1.0, "1", [1], {}], "true or false": [0, "true", 1.0, []], "a text": [1, ["x"], True], "a list of texts": ["x", [1], {}],
       "an object": [[1], "x", 3], "a number": ["1", True, float("nan"), float("inf"), 10 ** 400, [1]], "a token id": ["2", 2.0, True, {}, [["2"]]]}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_its_type_checked_and_the_error_names_file_and_field(tmp_path, name):
    values = next(values for words, values in BAD.items() if FIELDS[name].text.startswith(words))
    for value in values:
        if FIELDS[name].holds(value):
            continue
        (tmp_path / "config.json").write_text(json.dumps(config(**{name: value})))
        with pytest.raises(CheckpointError) as caught:
            load_model(str(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path}/config.json: {name} is ") and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", GENERATION_FIELDS)
def test_every_field_of_generation_config_has_its_type_checked(tmp_path, name):
    tiny.make_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({name: "2"}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {name} is '2'"):
        load_model(str(tmp_path), load_format="dummy")


def test_ids_outside_the_vocabulary_count_for_nothing_and_are_warned_of(tmp_path, caplog):
    """transformers warns as well; pad_token_id is -1 in published Llamas."""
    tiny.make_folder(tmp_path, eos_token_id=[256, 300, -1, 256], pad_token_id=-1, bos_token_id=10 ** 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 5000], "pad_token_id": 4000}))
    with caplog.at_level(logging.WARNING, "jaxllm"):
        cfg = load_model(str(tmp_path), load_format="dummy").cfg
    assert cfg.eos_token_ids == (256, 257) and cfg.bos_token_id is None
    assert all(word in caplog.text for word in ("[300, -1]", "pad_token_id", "bos_token_id", "generation_config.json: eos_token_id", "[5000]", "[4000]"))


def test_a_dtype_that_is_not_supported_is_said_to_be_another(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxllm"):
        model = load_model(tiny.make_folder(tmp_path, dtype="float64"), load_format="dummy")
    assert str(model.params.norm.dtype) == "float32" and "'float64'" in caplog.text and "float32" in caplog.text


def test_a_context_beyond_the_positions_is_warned_of(tmp_path, caplog):
    def warned(length, **changes):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "jaxllm"):
            load_model(tiny.make_folder(tmp_path, **changes), load_format="dummy", max_model_len=length)
        return "is made for" in caplog.text
    assert warned(257) and not warned(256)
    assert not warned(512, rope_scaling={"type": "linear", "factor": 2.0}) and warned(513, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert not warned(1024, rope_scaling=YARN) and warned(1025, rope_scaling=YARN)


# -- longrope ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def numpy_as_torch(monkeypatch):
    """transformers' own rope functions, run on numpy: they use nothing else of torch."""
    from transformers import modeling_rope_utils as rope

    class Array(np.ndarray):
        def float(self):
            return self.astype(np.float32)

    stub = types.SimpleNamespace(int64=np.int64, float32=np.float32, arange=lambda *a, dtype, device: np.arange(*a, dtype=dtype).view(Array),
                                 tensor=lambda v, dtype, device: np.array(v, dtype))
    monkeypatch.setattr(rope, "torch", stub, raising=False)
    return rope


@pytest.mark.parametrize("trained, longest, more, partial", [
    (64, 128, {}, 1.0), (64, 128, {"factor": 8.0}, 1.0), (64, 128, {"attention_factor": 1.3}, 0.5), (128, 128, {}, 1.0)])
def test_longrope_has_the_frequencies_of_transformers_to_the_bit(numpy_as_torch, trained, longest, more, partial):
    from transformers import LlamaConfig
    pairs, draw = int(96 * partial) // 2, np.random.default_rng(0)
    short, long = (1 + draw.random(pairs)).tolist(), (1 + 9 * draw.random(pairs)).tolist()
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long, **more}
    given = config(hidden_size=384, head_dim=96, max_position_embeddings=longest, original_max_position_embeddings=trained, rope_scaling=scaling,
                   partial_rotary_factor=partial)
    them = LlamaConfig(**copy.deepcopy(given))
    for length in (trained - 1, trained, trained + 1, 2 * trained):
        frequencies, magnitude = numpy_as_torch._compute_longrope_parameters(them, seq_len=length)
        ours = rope_spec(96, longest, rope_parameters(given), length)
        assert ours.frequencies == tuple(map(float, frequencies)) and ours.magnitude == magnitude
    assert rope_spec(96, longest, rope_parameters(given)) == rope_spec(96, longest, rope_parameters(given), longest)


def test_longrope_says_when_the_long_factors_serve_short_sequences_too(caplog):
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    with caplog.at_level(logging.WARNING, "jaxllm"):
        assert read(rope_scaling=scaling, max_model_len=64).layers[0].rope.frequencies == read().layers[0].rope.frequencies
        assert caplog.text == ""
        assert read(rope_scaling=scaling).layers[0].rope.frequencies == tuple(f / 2 for f in read().layers[0].rope.frequencies)
    assert "max_model_len=64 for the short ones" in caplog.text
    with pytest.raises(UnsupportedError, match="3 factors for 4 frequencies"):
        read(rope_scaling={**scaling, "long_factor": [2.0] * 3})


# -- tied heads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The tensors of the tiny model by name, with a head."""
    folder = tmp_path_factory.mktemp("weights")
    params = load_model(tiny.make_folder(folder, tie_word_embeddings=False), load_format="dummy").params
    named = {"model.embed_tokens.weight": params.embedding, "model.norm.weight": params.norm, "lm_head.weight": params.head}
    for i, layer in enumerate(params.layers):
        at = f"model.layers.{i}."
        named |= {f"{at}input_layernorm.weight": layer.attention_norm, f"{at}post_attention_layernorm.weight": layer.mlp_norm}
        named |= {f"{at}self_attn.{name}_proj.weight": getattr(layer, name).weight for name in "qkvo"}
        named |= {f"{at}mlp.{name}_proj.weight": getattr(layer, name).weight for name in ("gate", "up", "down")}
    return {name: np.array(value) for name, value in named.items()}


def saved(folder, named, **changes):
    path = tiny.make_folder(folder, **changes)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return path


def without(named, *names):
    return {name: value for name, value in named.items() if name not in names}


@pytest.mark.parametrize("prefix", ["", "base_model."])
def test_a_tied_head_that_differs_from_the_embedding_is_a_head(tmp_path, weights, caplog, prefix):
    path = saved(tmp_path, {prefix + name: value for name, value in weights.items()}, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, "jaxllm"):
        model = load_model(path)
    assert not model.cfg.tied and np.array_equal(model.params.head, weights["lm_head.weight"]) and "they differ" in caplog.text
    again = load_model(path, params=model.params)
    assert again.params is model.params and again.cfg == model.cfg


def test_a_tied_head_that_equals_the_embedding_is_dropped(tmp_path, weights, caplog):
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    same["lm_head.weight"][0, 0] = same["model.embed_tokens.weight"][0, 0] = 0.0
    same["lm_head.weight"][0, 0] = -0.0  # equal as a number
    model = load_model(saved(tmp_path, same, tie_word_embeddings=True))
    assert model.cfg.tied and model.params.head is None and "differ" not in caplog.text


def test_an_embedding_that_stands_only_as_the_head_is_the_embedding(tmp_path, weights):
    model = load_model(saved(tmp_path, without(weights, "model.embed_tokens.weight"), tie_word_embeddings=True))
    assert model.params.head is None and np.array_equal(model.params.embedding, weights["lm_head.weight"])
    with pytest.raises(CheckpointError, match="1 missing: embedding"):
        load_model(saved(tmp_path, without(weights, "model.embed_tokens.weight"), tie_word_embeddings=False))


def test_an_untied_model_without_its_head_is_refused_with_what_to_set(tmp_path, weights):
    path = saved(tmp_path, without(weights, "lm_head.weight"), tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r'no tensor for the head.*"tie_word_embeddings": true'):
        load_model(path)
    assert load_model(path, hf_overrides={"tie_word_embeddings": True}).params.head is None
    assert set(load_file(tmp_path / "model.safetensors")) == set(without(weights, "lm_head.weight"))


def test_a_cluttered_folder_answers_as_the_clean_one(tmp_path, weights):
    def answer(path):
        with LLM(path, max_model_len=32, max_num_seqs=1, max_num_batched_tokens=16) as llm:
            params = SamplingParams(max_tokens=4, temperature=0, logprobs=0, ignore_eos=True)
            return [(o.token_ids, o.cumulative_logprob) for o in llm.generate(["abc"], params)[0].outputs]
    clean = answer(saved(tmp_path / "clean", weights, tie_word_embeddings=False))
    left = dict.fromkeys(("model.layers.0.self_attn.rotary_emb.cos_cached", "rotary_emb.inv_freq", "v_head.summary.weight"), np.zeros(3, np.float32))
    path = saved(tmp_path / "full", {**weights, **left}, tie_word_embeddings=True, architectures=None, model_type="llama", use_cache=False, pad_token_id=-1)
    for name in ("adapter_model.safetensors", "value_head.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / "full" / name).write_bytes(b"not of this model")
    (tmp_path / "full/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00009.safetensors"}}')
    assert answer(path) == clean


# -- generation_config.json ----------------------------------------------------------------------------------------------


def test_sampling_of_the_folder_is_laid_under_the_callers_before_it_is_checked(tmp_path, capsys):
    from jaxllm.cli import main
    path = tiny.make_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": -1.0, "top_p": 0.5, "max_new_tokens": 3, "do_sample": True}))
    with LLM(path, load_format="dummy", max_model_len=32, max_num_seqs=2) as llm:
        assert llm.own_sampling() == {"temperature": -1.0, "top_p": 0.5, "max_tokens": 3}
        with pytest.raises(UsageError, match=f"{path}/generation_config.json: temperature=-1.0") as caught:
            llm.generate("a")
        assert caught.value.param == "temperature"
    options = ["generate", "a", "--model", path, "--load-format", "dummy", "--max-model-len", "32", "--max-num-seqs", "2"]
    assert main([*options, "--ignore-eos", "--temperature", "0.5", "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) == 3
    assert main(options) == 2 and "generation_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [
    ("num_beams", 4), ("no_repeat_ngram_size", 3), ("suppress_tokens", [1]), ("typical_p", 0.9), ("stop_strings", ["x"])])
def test_drawing_otherwise_is_refused_by_name_where_the_files_own_is_asked_for(name, value):
    with pytest.raises(UnsupportedError, match=f"generation_config.json: {name} "):
        own_sampling({name: value, "temperature": 0.5})
    assert own_sampling({"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "max_length": 20}) == {}


# -- inspect -------------------------------------------------------------------------------------------------------------


def test_an_inspection_lists_what_is_ignored_what_is_refused_and_what_lies_beside(tmp_path, weights, capsys):
    from jaxllm.cli import main
    path = saved(tmp_path, weights, tie_word_embeddings=False, use_cache=True, unheard_of=1, logit_scale=2.0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.5, "max_length": 20}))
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    assert main(["inspect", path, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == ["optimizer.pt"] and found["keys"] == account(tmp_path)
    keys = found["keys"]["config.json"]
    assert {"use_cache", "unheard_of"} <= set(keys["ignored"]) and "hidden_size" in keys["honoured"] and "logit_scale (2.0)" in keys["refused"]
    assert found["keys"]["generation_config.json"] == {"honoured": ["top_p"], "ignored": ["max_length"], "refused": None}
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    assert "unheard_of" in text and "max_length" in text and "optimizer.pt" in text and "logit_scale (2.0)" in text


def test_the_tables_do_not_overlap():
    assert not set(FIELDS) & set(CHANGING) and not set(GENERATION_FIELDS) & set(GENERATION_CHANGING)
    assert issubclass(CheckpointError, JaxllmError)
