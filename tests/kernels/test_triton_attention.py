"""Paged attention on Ampere and Ada, interpreted, on the list of attention_cases.py."""
import attention_cases as cases
import jax.numpy as jnp
import pytest

pytest.importorskip("jax.experimental.pallas.triton")
from pallas_kernels.triton_attention import attend, attention, write_kv  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreted_triton")


@pytest.mark.parametrize("width, group, page_size, window, softcap, dtype",
                         [*cases.SHAPES, (96, 20, 128, None, None, jnp.float32)])
def test_ragged_steps_match_float64_and_decode_repeats_their_bits(width, group, page_size, window, softcap, dtype):
    cases.ragged_steps_match_float64_and_decode_repeats_their_bits(attention, width, group, page_size, window, softcap, dtype)


def test_a_prompt_in_chunks_in_a_crowd_or_token_by_token_has_the_same_bits():
    cases.a_prompt_in_chunks_in_a_crowd_or_token_by_token_has_the_same_bits(attention)


def test_runs_of_any_length_repeat_one_block_that_does_all_splits():
    cases.runs_of_any_length_repeat_one_block_that_does_all_splits(attention)


def test_keys_and_values_reach_their_slots_and_nothing_else_changes():
    cases.keys_and_values_reach_their_slots_and_nothing_else_changes(write_kv)


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


@pytest.mark.slow
@pytest.mark.parametrize("width, group", [(64, 3), (80, 1), (128, 20)])
def test_float32_and_more_heads_than_a_tile(width, group):
    for window, softcap in cases.MASKS:
        cases.ragged_steps_match_float64_and_decode_repeats_their_bits(attention, width, group, 16, window, softcap, jnp.float32)
