"""Every target is filled once and every source used or ignored by name; otherwise one error says all that is wrong."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint import Concat, Ignore, Reshape, Rule, Slice, Stack, Transpose, open_checkpoint
from jaxllm.checkpoint.load import dummy_params, leaf_path, load_params
from jaxllm.errors import CheckpointError

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    q: Any
    k: Any
    norm: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    embed: Any
    layers: tuple[Layer, ...]


RULES = (
    Rule("model.embed.weight", "embed"),
    Rule("model.layers.{i}.qk.weight", "layers.{i}.q", Slice(0, 0, 4)),
    Rule("model.layers.{i}.qk.weight", "layers.{i}.k", Slice(0, 4, 6)),
    Rule("model.layers.{i}.norm.weight", "layers.{i}.norm"),
    Rule("lm_head.weight", "lm_head", optional=True),
    Ignore("model.layers.{i}.rotary.inv_freq"),
)


def sds(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def template(layers=12):
    return Params(sds(10, 4), tuple(Layer(sds(4, 4), sds(2, 4), sds(4)) for _ in range(layers)))


def tensors(layers=12):
    rng = np.random.default_rng(0)
    named = {"model.embed.weight": rng.normal(size=(10, 4)).astype(F32), "lm_head.weight": np.ones((10, 4), F32)}
    for i in range(layers):
        named[f"model.layers.{i}.qk.weight"] = rng.normal(size=(6, 4)).astype(F32)
        named[f"model.layers.{i}.norm.weight"] = rng.normal(size=(4,)).astype(F32)
        named[f"model.layers.{i}.rotary.inv_freq"] = np.zeros(2, F32)
    return named


def load(tmp_path, named, rules=RULES, to=None, **options):
    save_file(named, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        return load_params(checkpoint, rules, to or template(), **options)


def test_slices_of_one_source_fill_two_targets(tmp_path):
    named = tensors()
    params = load(tmp_path, named)
    for i, layer in enumerate(params.layers):
        assert np.array_equal(np.concatenate([layer.q, layer.k]), named[f"model.layers.{i}.qk.weight"])
    assert np.array_equal(params.embed, named["model.embed.weight"])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "module." + name,
        lambda name: "state_dict.module." + name,
        lambda name: "model." + name,
        lambda name: name.removeprefix("model."),
        lambda name: "module." + name.removeprefix("model."),
    ],
)
def test_prefixes_of_wrappers_are_found_and_named(tmp_path, rename, caplog):
    named = tensors()
    with caplog.at_level(logging.INFO, "jaxllm.checkpoint"):
        params = load(tmp_path, {rename(name): value for name, value in named.items()})
    assert np.array_equal(params.layers[11].norm, named["model.layers.11.norm.weight"])
    assert "prefix" in caplog.text and "inv_freq" in caplog.text


def test_training_state_beside_a_wrapped_model_is_left_out_by_name(tmp_path, caplog):
    named = {"model." + name: value for name, value in tensors().items()}
    named["optimizer.state.0.exp_avg"] = np.zeros(3, F32)
    with caplog.at_level(logging.INFO, "jaxllm.checkpoint"):
        load(tmp_path, named)
    assert "optimizer.**" in caplog.text


@pytest.mark.parametrize("wrapped", ["", "model.", "checkpoint.model."])
@pytest.mark.parametrize("beside", [
    "rng_state", "cuda_rng_state.0", "random_rng_state.1", "rng_tracker_states.model-parallel-rng", "optimizer.state.0.exp_avg",
    "optimizer_state", "optim_state.0", "lr_scheduler.last_lr", "scaler.scale", "global_step", "epoch", "loss",
    "model.rotary_emb.inv_freq", "rotary_emb.cos_cached", "model.layers.3.self_attn.rotary_emb.sin_cached", "rope.freqs",
    "transformer.h.0.attn.rotary_emb.original_inv_freq"])
def test_leftovers_of_trainers_and_rotary_caches_are_left_out_wherever_they_stand(tmp_path, wrapped, beside):
    outer = wrapped.removesuffix("model.")
    named = {wrapped + name: value for name, value in tensors(1).items()} | {outer + beside: np.zeros(3, F32)}
    params = load(tmp_path, named, to=template(1))
    assert np.array_equal(params.layers[0].norm, named[wrapped + "model.layers.0.norm.weight"])


def test_a_tensor_that_is_no_leftover_is_still_unexpected(tmp_path):
    for name in ("model.layers.0.rotary_emb_scale.weight", "layers.0.optimizer", "stepwise", "model.rotary_emb.weight"):
        with pytest.raises(CheckpointError, match="1 unexpected"):
            load(tmp_path, tensors(1) | {name: np.zeros(3, F32)}, to=template(1))


def test_one_error_lists_missing_unexpected_and_misshapen(tmp_path):
    named = tensors()
    del named["model.embed.weight"]
    for i in range(12):
        named[f"model.layers.{i}.bias"] = np.zeros(4, F32)
    named["model.layers.3.norm.weight"] = np.zeros(5, F32)
    named["model.layers.4.norm.weight"] = np.zeros(4, np.int32)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, named)
    message = str(caught.value)
    assert "1 missing: embed" in message
    assert "12 unexpected: model.layers.{0..11}.bias (12)" in message
    assert "model.layers.3.norm.weight is [5], layers.3.norm wants [4]" in message
    assert "model.layers.4.norm.weight is int32, layers.4.norm wants float32" in message
    assert "\n" not in message and len(message) < 1000


def test_a_target_filled_twice_is_an_error(tmp_path):
    rules = (*RULES, Rule("other", "embed"))
    with pytest.raises(CheckpointError, match="embed is filled by"):
        load(tmp_path, {**tensors(), "other": np.zeros((10, 4), F32)}, rules)


def test_the_error_comes_before_any_tensor_is_placed(tmp_path):
    placed = []
    with pytest.raises(CheckpointError):
        load(tmp_path, tensors(11), place=lambda path, array: placed.append(path))
    assert placed == []


def test_dtype_is_cast_on_the_way_and_only_for_floats(tmp_path):
    values = np.random.default_rng(1).normal(size=100).astype(F32)
    to = {"a": sds(100), "n": sds(3, dtype=np.dtype(np.int8))}
    rules = (Rule("a", "a"), Rule("n", "n"))
    params = load(tmp_path, {"a": values, "n": np.arange(3, dtype=np.int8)}, rules, to, dtype=BF16)
    assert params["a"].dtype == BF16 and params["n"].dtype == np.int8
    assert np.array_equal(params["a"], values.astype(BF16))


@pytest.mark.parametrize("source", [BF16, np.dtype(np.float16), F32, np.dtype(np.float64), np.dtype(ml_dtypes.float8_e4m3fn)])
@pytest.mark.parametrize("target", [BF16, np.dtype(np.float16), F32])
def test_casts_agree_with_numpy_also_when_split_among_threads(tmp_path, source, target):
    # 3 M values of 2 bytes pass the size at which a copy is split; all bit patterns of a 16-bit float are among them.
    bits = np.arange(3 << 20, dtype=np.uint32).astype(np.uint16)
    floats = bits.view(BF16).astype(F32)
    values = np.where(np.abs(floats) < 448, floats, 0).astype(source).reshape(3, -1)  # 448 is float8_e4m3fn's largest
    params = load(tmp_path, {"a": values}, (Rule("a", "a"),), {"a": sds(*values.shape, dtype=target)})
    assert np.asarray(params["a"]).tobytes() == values.astype(target).tobytes()


def test_a_cast_that_overflows_float16_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="float16.*bfloat16"):
        load(tmp_path, {"a": np.array([1.0, 1e6], F32)}, (Rule("a", "a"),), {"a": sds(2)}, dtype=np.float16)


def test_arrays_do_not_alias_the_file(tmp_path):
    values = np.arange(1 << 16, dtype=F32)
    params = load(tmp_path, {"a": values}, (Rule("a", "a"),), {"a": sds(1 << 16)})
    with open(tmp_path / "model.safetensors", "r+b") as handle:
        handle.seek(-4, 2)
        handle.write(b"\0\0\0\0")
    assert float(params["a"][-1]) == values[-1]


def test_transforms_compose_and_parts_join(tmp_path):
    rng = np.random.default_rng(2)
    named = {f"e.{i}.w": rng.normal(size=(2, 3)).astype(F32) for i in range(11)}
    named |= {"b": rng.normal(size=(5, 3)).astype(F32), "c": rng.normal(size=(4, 3)).astype(F32)}
    rules = (
        Rule("e.{e}.w", "stacked", (Transpose(), Stack())),
        Rule(("c", "b"), "joined", Concat(0)),
        Rule("b", "flat", (Slice(0, 1, 5), Transpose((1, 0)), Reshape((2, -1)))),
    )
    params = load(tmp_path, named, rules, {"stacked": sds(11, 3, 2), "joined": sds(9, 3), "flat": sds(2, 6)})
    assert np.array_equal(params["stacked"], np.stack([named[f"e.{i}.w"].T for i in range(11)]))
    assert np.array_equal(params["joined"], np.concatenate([named["c"], named["b"]]))
    assert np.array_equal(params["flat"], named["b"][1:].T.reshape(2, 6))


def test_a_hole_in_a_stack_is_an_error(tmp_path):
    named = {f"e.{i}": np.zeros(2, F32) for i in (0, 1, 3)}
    with pytest.raises(CheckpointError, match="lacks parts"):
        load(tmp_path, named, (Rule("e.{e}", "stacked", Stack()),), {"stacked": sds(3, 2)})


@pytest.mark.parametrize(
    "arguments",
    [("a.{i}", "b"), ("a", "b.{i}"), (("a", "b"), "c"), ("a", "b", Concat()), ("a.{i}", "b.{i}", Stack()), ("a.{i}", "b", (Stack(), Transpose()))],
)
def test_a_rule_that_cannot_work_is_refused_when_written(arguments):
    with pytest.raises(ValueError):
        Rule(*arguments)


def test_place_gets_every_path_once_and_decides(tmp_path):
    seen = []

    def place(path, array):
        seen.append(path)
        return jax.device_put(array + 1)

    named = tensors()
    params = load(tmp_path, named, place=place)
    assert sorted(seen) == sorted(leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(template()))
    assert np.array_equal(params.embed, named["model.embed.weight"] + 1)


def test_double_precision_is_refused_while_jax_has_none(tmp_path):
    with pytest.raises(Exception, match="64-bit"):
        load(tmp_path, {"a": np.zeros(3)}, (Rule("a", "a"),), {"a": sds(3, dtype=np.dtype(np.float64))})


def test_dummy_weights_depend_on_the_seed_and_the_paths_alone():
    one, two = dummy_params(template(), 7), dummy_params(template(), 7)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))
    other = dummy_params(template(), 8)
    assert not np.array_equal(one.embed, other.embed)
    assert not np.array_equal(one.layers[0].q, one.layers[1].q)
    assert np.array_equal(dummy_params(template(2), 7).layers[1].q, one.layers[1].q)


def test_dummy_norms_are_near_one_and_weights_near_zero():
    params = dummy_params({"layers": [{"attn_norm": sds(5000), "mlp": sds(2000, 1000, dtype=BF16)}], "final_norm": {"bias": sds(5000)}})
    assert abs(float(params["layers"][0]["attn_norm"].mean()) - 1) < 0.01
    assert abs(float(params["layers"][0]["mlp"].astype(F32).std()) - 0.02) < 0.001
    assert abs(float(params["final_norm"]["bias"].mean())) < 0.01


@pytest.mark.parametrize("name", ["views.pt", "views-legacy.pt", "views-deflated.pt", "views-big-endian.pt"])
def test_every_view_is_loaded_as_it_reads(name):
    data = Path(__file__).parents[1] / "data/pt"
    with open_checkpoint(data / name) as checkpoint:
        template = {key: sds(*lazy.shape) for key, lazy in checkpoint.items()}
        params = load_params(checkpoint, [Rule(key, key) for key in checkpoint], template)
        for key, lazy in checkpoint.items():
            assert np.asarray(params[key]).tobytes() == lazy.numpy().tobytes(), key
        straight = {key for key, lazy in checkpoint.items() if lazy.span is not None}
    plain = {"base", "scalar", "scalar_of_base", "empty", "empty_strided"}
    assert straight & {"transposed", "strided", "rows", "expanded", "channels_last"} == set()
    assert straight >= plain - {"empty", "empty_strided"} if name in ("views.pt", "views-legacy.pt") else straight == set()


def test_a_file_cut_while_it_is_open_is_an_error_of_ours(tmp_path):
    save_file({"a": np.zeros(1 << 16, F32)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 4096)
        with pytest.raises(CheckpointError, match="became shorter"):
            load_params(checkpoint, (Rule("a", "a"),), {"a": sds(1 << 16)})
