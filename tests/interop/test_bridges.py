"""Parameters go to flax and orbax and come back with the same bits, and what changed on the way is named."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, UsageError
from jaxllm.interop import flax as flax_bridge
from jaxllm.interop import orbax as orbax_bridge


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    q: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    embed: Any
    layers: tuple[Layer, ...]
    extra: dict


def params() -> Params:
    """All bit patterns of bfloat16 (NaNs among them), floats, and twelve layers, so that "10" sorts before "2"."""
    rng = np.random.default_rng(0)
    bits = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).reshape(256, 256)
    layers = tuple(Layer(jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32)), None if i % 2 else jnp.full(3, i, jnp.float16)) for i in range(12))
    return Params(jnp.asarray(bits), layers, {"scale": jnp.ones((2,), jnp.float8_e4m3fn), "count": jnp.arange(3)})


def same(a, b) -> bool:
    pairs = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(pairs)


def test_linen_round_trip_is_bit_equal():
    variables = flax_bridge.to_linen(params())
    assert variables["params"]["layers"]["10"]["q"].shape == (3, 4)
    assert same(flax_bridge.from_linen(variables, params()), params())


def test_nnx_round_trip_is_bit_equal_and_leaves_are_params():
    state = flax_bridge.to_nnx(params())
    assert all(isinstance(leaf, nnx.Param) for _, leaf in nnx.to_flat_state(state))
    assert same(flax_bridge.from_nnx(state, params()), params())


def test_an_nnx_module_of_the_same_shape_gives_its_params():
    class Head(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.full(2, 3.0))
            self.seen = nnx.BatchStat(jnp.zeros(1))

    assert flax_bridge.from_nnx(Head(), {"scale": jax.ShapeDtypeStruct((2,), jnp.float32)})["scale"].tolist() == [3, 3]


def test_a_linen_module_runs_on_the_exported_tree():
    from flax import linen

    tree = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
    out = linen.Dense(3).apply(flax_bridge.to_linen(tree), jnp.ones((1, 2)))
    assert out.tolist() == [[4, 6, 8]]


def test_what_changed_on_the_way_is_named():
    variables = flax_bridge.to_linen(params())
    variables["params"]["layers"]["3"]["q"] = jnp.zeros((4, 3))
    variables["params"]["embed"] = variables["params"]["embed"].astype(jnp.float32)
    variables["params"]["extra"].pop("count")
    variables["params"]["extra"]["new"] = jnp.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        flax_bridge.from_linen(variables, params())
    for text in ("extra.count is missing", "extra.new is unexpected", r"layers.3.q is float32[4, 3]", "embed is float32[256, 256] and must be bfloat16"):
        assert text in str(caught.value)
    with pytest.raises(CheckpointError, match="batch_stats"):
        flax_bridge.from_linen({"params": {}, "batch_stats": {}}, params())


def test_orbax_round_trip_is_bit_equal(tmp_path):
    orbax_bridge.save_params(tmp_path / "saved", params())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params())
    assert same(orbax_bridge.restore_params(tmp_path / "saved", params()), params())
    assert same(orbax_bridge.restore_params(tmp_path / "saved", abstract), params())


def test_what_the_bridge_saves_is_a_checkpoint_too(tmp_path):
    orbax_bridge.save_params(tmp_path / "saved", params())
    with open_checkpoint(tmp_path / "saved") as checkpoint:
        assert checkpoint["layers.10.q"].numpy().tobytes() == np.asarray(params().layers[10].q).tobytes()


def test_orbax_saves_and_restores_sharded(tmp_path):
    """On however many devices the run has; tests/interop/test_sharded.py starts a process that has four."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("tp",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tp"))
    whole = {"w": jnp.arange(32.0).reshape(8, 4)}
    orbax_bridge.save_params(tmp_path / "saved", {"w": jax.device_put(whole["w"], rows)})
    restored = orbax_bridge.restore_params(tmp_path / "saved", whole, sharding=lambda name, leaf: rows)
    assert restored["w"].sharding.is_equivalent_to(rows, 2) and same(restored, whole)


def test_orbax_refuses_what_does_not_fit(tmp_path):
    orbax_bridge.save_params(tmp_path / "saved", params())
    with pytest.raises(UsageError, match="exists already"):
        orbax_bridge.save_params(tmp_path / "saved", params())
    orbax_bridge.save_params(tmp_path / "saved", params(), overwrite=True)
    for changed, match in (
        (replace(params(), embed=jnp.zeros((256, 256))), "embed is bfloat16.* and must be float32"),
        (replace(params(), embed=jnp.zeros((4, 4), jnp.bfloat16)), r"must be bfloat16\[4, 4\]"),
        (replace(params(), layers=params().layers[:2]), "layers.2.q is unexpected"),
    ):
        with pytest.raises(CheckpointError, match=match):
            orbax_bridge.restore_params(tmp_path / "saved", changed)
    with pytest.raises(CheckpointError, match="no orbax checkpoint"):
        orbax_bridge.restore_params(tmp_path, params())
