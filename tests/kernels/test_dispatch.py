"""The seam chooses what the device can run, says why, and refuses a named choice by its reason."""
import sys

import jax
import jax.experimental.pallas
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import choose


def test_on_a_cpu_auto_is_the_serving_reference_and_says_why():
    chosen = choose("cpu", None, 64, jnp.bfloat16, 16)
    assert chosen == dispatch.SERVING
    assert "cpu" in chosen.reasons[0]


def test_on_a_hopper_auto_is_mosaic():
    for platform in ("gpu", "cuda"):
        assert choose(platform, "9.0", 128, jnp.bfloat16, 16).name == "mosaic"


def test_the_same_choice_is_equal_and_hashes_alike():
    a, b = (choose("gpu", "9.0", 128, jnp.bfloat16, 16, want) for want in ("auto", "mosaic"))
    assert a == b and hash(a) == hash(b)


def test_on_an_ampere_or_an_ada_auto_is_triton_and_keeps_why_not_mosaic():
    for capability in ("8.0", "8.6", 8.9, (8, 9)):
        chosen = choose("gpu", capability, 80, jnp.float16, 16)
        assert chosen.name == "triton" and chosen == choose("gpu", capability, 80, jnp.float16, 16, "triton")
        assert "9.0" in chosen.reasons[0] and "Ada" in chosen.reasons[1]


@pytest.mark.parametrize("want, arguments, word", [
    ("mosaic", ("cpu", None, 64, jnp.bfloat16, 16), "platform is cpu"),
    ("mosaic", ("gpu", "10.0", 64, jnp.bfloat16, 16), "10.0"),
    ("mosaic", ("gpu", "9.0", 72, jnp.bfloat16, 16), "head_dim 72"),
    ("mosaic", ("gpu", "9.0", 192, jnp.bfloat16, 16), "head_dim 192"),
    ("mosaic", ("gpu", "9.0", 64, jnp.float32, 16), "float32"),
    ("mosaic", ("gpu", "9.0", 64, jnp.bfloat16, 48), "page_size 48"),
    ("mosaic", ("gpu", "9.0", 256, jnp.bfloat16, 128), "page_size 128"),
    ("triton", ("cpu", None, 64, jnp.bfloat16, 16), "platform is cpu"),
    ("triton", ("gpu", "7.5", 64, jnp.bfloat16, 16), "7.5"),
    ("triton", ("gpu", "12.0", 64, jnp.bfloat16, 16), "12.0"),
    ("triton", ("gpu", "8.0", 260, jnp.bfloat16, 16), "head_dim 260"),
    ("triton", ("gpu", "8.0", 256, jnp.float32, 16), "head_dim 256 in float32"),
    ("triton", ("gpu", "8.0", 64, jnp.int8, 16), "int8"),
])
def test_what_kernels_cannot_take_is_refused_by_name_and_auto_falls_back(want, arguments, word):
    with pytest.raises(ValueError, match=word):
        choose(*arguments, want=want)
    chosen = choose(*arguments)
    assert chosen.name == "reference" and any(word in reason for reason in chosen.reasons if reason.startswith(want))


def test_mosaic_is_refused_before_hopper_and_triton_on_hopper_where_its_order_would_depend_on_the_rows():
    with pytest.raises(ValueError, match="the device has 8.0"):
        choose("gpu", "8.0", 64, jnp.bfloat16, 16, want="mosaic")
    with pytest.raises(ValueError, match="two orders of a sum"):
        choose("gpu", "9.0", 64, jnp.bfloat16, 16, want="triton")


def test_a_jax_without_triton_falls_back_to_the_reference_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)  # what an import of a missing module meets
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)
    with pytest.raises(ValueError, match="no Triton backend"):
        choose("gpu", "8.0", 64, jnp.bfloat16, 16, want="triton")
    chosen = choose("gpu", "8.0", 64, jnp.bfloat16, 16)
    assert chosen.name == "reference" and "no Triton backend" in chosen.reasons[1] and "depend on the batch" in chosen.reasons[2]


def test_without_reproducibility_sums_are_xlas_own_but_for_a_kernel_that_reads_a_row_once_for_many_thresholds():
    from pallas_kernels import fast, mosaic_tail, triton_rows
    kinds = {name: choose(platform, capability, 128, jnp.bfloat16, 16, reproducible=False)
             for name, platform, capability in (("reference", "cpu", None), ("triton", "gpu", "8.0"), ("mosaic", "gpu", "9.0"))}
    assert [kernels.name for kernels in kinds.values()] == [f"{name}+fast" for name in kinds]
    assert [(kernels.tail_sums, kernels.search_ways) for kernels in kinds.values()] == [
        (fast.tail_sums, 2), (triton_rows.tail_sums, 16), (mosaic_tail.tail_sums, 16)]


def test_an_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="auto, mosaic, triton and reference"):
        choose("cpu", None, 64, jnp.bfloat16, 16, want="cuda")
