"""How config.json becomes a ModelConfig: both published layouts, what is absent, and what is refused by name."""
import math

import numpy as np
import pytest

from jaxllm.errors import JaxllmError, UnsupportedError
from jaxllm.layers.rope import rope_spec
from jaxllm.models.registry import FAMILIES, family

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}


def read(max_model_len=None, **changes):
    config = {**LLAMA, **changes}
    return family(config).read_config(config, max_model_len)


def rope(**changes):
    return read(**changes).layers[0].rope


def in_float32(base, width=8):
    """1 / base ** (i / width) as torch rounds it."""
    return tuple(float(np.float32(1) / np.float32(base ** (i / width))) for i in range(0, width, 2))


def test_silence_means_what_transformers_takes_it_for():
    cfg = read()
    assert cfg.head_dim == 8 and not cfg.tied and cfg.activation == "silu" and cfg.eos_token_ids == ()
    assert cfg.layers[0].rope.frequencies == in_float32(10000)
    assert read(num_key_value_heads=None).num_kv_heads == 4
    assert read(architectures=["Qwen3ForCausalLM"]).head_dim == 128
    assert [layer.window for layer in read(architectures=["MistralForCausalLM"]).layers] == [4096, 4096]
    assert [layer.window for layer in read(architectures=["MistralForCausalLM"], sliding_window=None).layers] == [None, None]


def test_end_tokens_are_one_a_list_or_none():
    assert read(eos_token_id=2).eos_token_ids == (2,) and read(eos_token_id=[2, 5]).eos_token_ids == (2, 5)


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}])
def test_both_layouts_of_rope_settings_mean_the_same(scaling):
    new = rope(rope_parameters={**scaling, "rope_theta": 500.0})
    old = rope(rope_theta=500.0, rope_scaling=scaling)
    oldest = rope(rope_theta=500.0, rope_scaling={"type" if name == "rope_type" else name: v for name, v in scaling.items()})
    assert new == old == oldest
    if scaling["rope_type"] != "dynamic":
        assert new != rope(rope_theta=500.0)


def test_linear_scaling_divides_every_frequency():
    assert rope(rope_scaling={"type": "linear", "factor": 4.0}).frequencies == tuple(f / 4 for f in rope().frequencies)


def test_dynamic_scaling_follows_max_model_len_and_not_the_sequence():
    scaling = {"type": "dynamic", "factor": 2.0}
    assert rope(rope_scaling=scaling) == rope(rope_scaling=scaling, max_model_len=100) == rope()
    base = 10000.0 * (2.0 * 256 / 128 - 1) ** (8 / 6)
    stretched = rope(rope_scaling=scaling, max_model_len=256).frequencies
    assert stretched == in_float32(base)


def test_trained_length_beside_the_scaling_goes_first():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert rope(rope_scaling=scaling, original_max_position_embeddings=32) == \
        rope(rope_scaling={**scaling, "original_max_position_embeddings": 32}) != rope(rope_scaling=scaling)


def test_yarn_without_factor_takes_the_ratio_of_the_lengths():
    known = {"rope_type": "yarn", "original_max_position_embeddings": 32}
    assert rope(rope_scaling={**known, "factor": None}) == rope(rope_scaling={**known, "factor": 4.0})
    assert rope(rope_scaling={**known, "factor": 4.0}).magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_partial_rotation_turns_the_first_widths_of_a_head():
    half = {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert rope(rope_parameters=half).frequencies == rope(partial_rotary_factor=0.5).frequencies == in_float32(10000, 4)


def test_windows_lie_on_the_upper_layers_or_where_layer_types_says():
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 8}
    windows = lambda **changes: [layer.window for layer in read(**qwen, **changes).layers]  # noqa: E731
    assert windows() == windows(use_sliding_window=False) == [None] * 4
    assert windows(use_sliding_window=True, max_window_layers=3) == [None, None, None, 8]
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, max_window_layers=0, layer_types=types) == [8, None, 8, None]


@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *FAMILIES]),
    ({"architectures": []}, ["missing from config.json", *FAMILIES]),
    ({"architectures": None}, ["missing from config.json"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["awq", "float32"]),
    ({"quantization_config": {"bits": 4}}, ["unnamed"]),
    ({"rope_scaling": {"type": "su", "factor": 4.0}}, ["su", "linear", "yarn"]),
    ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, ["longrope", "short_factor"]),
    ({"rope_parameters": {"rope_type": "mrope"}}, ["mrope", "llama3"]),
    ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
    ({"rope_scaling": {"type": "linear", "factor": "two"}}, ["linear", "two"]),
    ({"rope_scaling": {"type": "yarn"}}, ["yarn", "factor"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
    ({"hidden_act": "relu6"}, ["relu6", "silu"]),
    ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
    ({"vocab_size": None}, ["vocab_size"]),
    ({"num_hidden_layers": None}, ["num_hidden_layers"]),
    ({"architectures": ["MistralForCausalLM"], "num_hidden_layers": None}, ["num_hidden_layers"]),
    ({"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": None}, ["num_hidden_layers"]),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 2},
     ["chunked_attention", "full_attention"]),
])
def test_what_is_not_supported_is_refused_by_name_on_one_line(changes, words):
    with pytest.raises(UnsupportedError) as caught:
        read(**changes)
    assert isinstance(caught.value, JaxllmError) and "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_rope_of_no_known_type_names_all_that_are_known():
    with pytest.raises(UnsupportedError, match="default, linear, dynamic, llama3, yarn"):
        rope_spec(8, 128, {"rope_type": "su"})
