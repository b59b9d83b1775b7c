"""Norms and sums along a row, simulated: right against float64, and a row alone has the bits of the row in a crowd."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_rows as mr

pytestmark = pytest.mark.usefixtures("interpreted")
WIDTHS = [80, 576, 4096 + 128 + 72, 128 + 77]  # less than a warpgroup; pieces and a rest; a whole piece too; padded, as it is odd


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_match_float64_and_do_not_see_each_other(width):
    keys = jax.random.split(jax.random.key(width), 2)
    x = jax.random.normal(keys[0], (3, 2, width)) * 3
    weight = jax.random.normal(keys[1], (width,)).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    for got, want, alone in (
            (mr.row_sum(x), wide.sum(-1), mr.row_sum(x[1:2, 1])),
            (mr.log_sum_exp(x), np.log(np.exp(wide).sum(-1)), mr.log_sum_exp(x[1:2, 1]))):
        # at most width / 128 + 12 float32 additions deep
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5 * width ** 0.5)
        np.testing.assert_array_equal(np.asarray(got)[1, 1], np.asarray(alone)[0])
    short = x.astype(jnp.bfloat16)
    wide, scale = np.asarray(short).astype(np.float64), np.asarray(weight).astype(np.float64)
    got = mr.rms_norm(short, weight, 1e-5)
    want = wide / np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), want, rtol=2.0 ** -8)  # one rounding to bfloat16
    alone = mr.rms_norm(short[1:2, 1], weight, 1e-5)
    np.testing.assert_array_equal(np.asarray(got)[1, 1].view(np.uint16), np.asarray(alone)[0].view(np.uint16))


def test_log_sum_exp_of_large_and_absent_logits():
    x = jnp.full((2, 300), -jnp.inf).at[0, 7].set(1e4).at[1, 3:5].set(-1e4)
    np.testing.assert_allclose(np.asarray(mr.log_sum_exp(x)), [1e4, -1e4 + np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("width, padded", [(576, False), (896, False), (64, True), (129, True)])
def test_a_norm_of_aligned_rows_copies_nothing(width, padded):
    x = jax.ShapeDtypeStruct((2, width), jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x, w: mr.rms_norm(x, w, 1e-5))(x, jax.ShapeDtypeStruct((width,), jnp.bfloat16)))
    assert (" pad[" in text) == padded
