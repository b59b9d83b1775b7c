"""Paged attention on Hopper, simulated, on the list of attention_cases.py."""
import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_attention as ma
from pallas_kernels import reference
from pallas_kernels.mosaic_attention import attend, attention
from pallas_kernels.mosaic_kv import write_kv
from pallas_kernels.ragged import Ragged

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("width, group, page_size, window, softcap, dtype", cases.SHAPES)
def test_ragged_steps_match_float64_and_decode_repeats_their_bits(width, group, page_size, window, softcap, dtype):
    cases.ragged_steps_match_float64_and_decode_repeats_their_bits(attention, width, group, page_size, window, softcap, dtype)


def test_a_prompt_in_chunks_in_a_crowd_or_token_by_token_has_the_same_bits():
    cases.a_prompt_in_chunks_in_a_crowd_or_token_by_token_has_the_same_bits(attention)


def test_runs_of_any_length_repeat_one_block_that_does_all_splits():
    cases.runs_of_any_length_repeat_one_block_that_does_all_splits(attention)


def reference_write(k_pages, v_pages, k, v, slots):
    return reference.write_kv(k_pages, k, slots), reference.write_kv(v_pages, v, slots)


@pytest.mark.parametrize("write_kv", [write_kv, reference_write])
def test_keys_and_values_reach_their_slots_and_nothing_else_changes(write_kv):
    cases.keys_and_values_reach_their_slots_and_nothing_else_changes(write_kv)


@pytest.mark.parametrize("attend", [ma.attend, reference.attend])
@pytest.mark.parametrize("decode", [True, False])
def test_slots_and_tables_out_of_range_change_no_page(attend, decode):
    i32 = lambda *values: jnp.asarray(values, jnp.int32)
    pages = jax.random.normal(jax.random.key(9), (4, 16, 1, 64)).astype(jnp.bfloat16)
    rows = jnp.ones((3, 1, 64), jnp.bfloat16)
    tables = jnp.asarray([[-1, 4, 2 ** 30], [1000, -2 ** 31, 3], [-2 ** 31, 2 ** 31 - 1, -1]], jnp.int32)
    ragged = Ragged(i32(3, 20, 2 ** 20), i32(-5, 64, -2 ** 31), i32(4, 21, 0), tables, None if decode else i32(0, 1, 2, 2))
    _, k_pages, v_pages = attend(rows, rows, rows, pages, pages, ragged, scale=0.125)
    cases.same(np.asarray(k_pages), np.asarray(pages))
    cases.same(np.asarray(v_pages), np.asarray(pages))


def test_attend_sees_what_it_wrote():
    cases.attend_sees_what_it_wrote(attend, attention)


def test_pages_of_another_dtype_are_refused():
    case = cases.make([3], 1, 1, 64, 16)
    q, ragged = case.step([(0, 0, 3)])
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, case.k_pages.astype(jnp.float16), case.v_pages, ragged, scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("width", cases.WIDTHS)
@pytest.mark.parametrize("page_size", cases.PAGE_SIZES)
@pytest.mark.parametrize("group", cases.GROUPS)
@pytest.mark.parametrize("window, softcap", cases.MASKS)
def test_every_shape(width, page_size, group, window, softcap):
    shape = width, group, page_size, window, softcap, jnp.bfloat16
    cases.ragged_steps_match_float64_and_decode_repeats_their_bits(attention, *shape)
