"""The seam chooses what the device can run, says why, and refuses a named choice by its reason."""
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


@pytest.mark.parametrize("arguments, word", [
    (("cpu", None, 64, jnp.bfloat16, 16), "platform is cpu"),
    (("gpu", "8.0", 64, jnp.bfloat16, 16), "8.0"),
    (("gpu", "10.0", 64, jnp.bfloat16, 16), "10.0"),
    (("gpu", "9.0", 72, jnp.bfloat16, 16), "head_dim 72"),
    (("gpu", "9.0", 192, jnp.bfloat16, 16), "head_dim 192"),
    (("gpu", "9.0", 64, jnp.float32, 16), "float32"),
    (("gpu", "9.0", 64, jnp.bfloat16, 48), "page_size 48"),
    (("gpu", "9.0", 256, jnp.bfloat16, 128), "page_size 128"),
])
def test_what_mosaic_cannot_take_is_refused_by_name_and_auto_falls_back(arguments, word):
    with pytest.raises(ValueError, match=word):
        choose(*arguments, want="mosaic")
    chosen = choose(*arguments)
    assert chosen.name == "reference" and word in chosen.reasons[0]


def test_on_a_card_without_kernels_the_fallback_says_that_bits_may_depend_on_the_batch():
    assert "depend on the batch" in choose("gpu", "8.9", 64, jnp.bfloat16, 16).reasons[1]


def test_triton_is_refused_because_it_is_not_written():
    with pytest.raises(ValueError, match="not written"):
        choose("gpu", "8.0", 64, jnp.bfloat16, 16, want="triton")


def test_an_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="auto, mosaic, triton and reference"):
        choose("cpu", None, 64, jnp.bfloat16, 16, want="cuda")
