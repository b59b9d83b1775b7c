"""Rotary position embedding: the frequencies of each published scaling, and the rotation."""
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.mapped import brief
from jaxllm.config import RopeSpec
from jaxllm.errors import UnsupportedError
from jaxllm.fields import ROPE_FIELDS, check_fields
from pallas_kernels.rounding import product, rounded

log = logging.getLogger("jaxllm")


def rotate(x: jax.Array, positions: jax.Array, spec: RopeSpec) -> jax.Array:
    """x [T, heads, H] with the first 2 * len(frequencies) widths of each head turned by its position [T]; x's dtype."""
    half = len(spec.frequencies)
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(spec.frequencies, jnp.float32)
    cos = jnp.tile(jnp.cos(angle) * spec.magnitude, 2)[:, None]  # [T, 1, 2 * half]
    sin = jnp.tile(jnp.sin(angle) * spec.magnitude, 2)[:, None]
    wide = x[..., :2 * half].astype(jnp.float32)
    crossed = product(jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1), sin)
    turned = rounded(wide * cos + crossed, x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half:]], axis=-1)


def rope_spec(head_dim: int, max_position: int, parameters: dict, max_model_len: int | None = None) -> RopeSpec:
    """The frequencies that a Hugging Face `rope_parameters` entry describes.

    `dynamic` scaling depends on the length of the sequence at hand. A cached key cannot be turned again, and the bits of
    a token may not depend on what follows it, so the base is fixed for `max_model_len`: up to the trained length it is the
    unscaled one, beyond it the one that transformers uses for a sequence of exactly that length. `longrope` has one set of
    factors for short sequences and one for long, and is decided in the same way: the long ones if `max_model_len` is beyond
    the trained length, as in vLLM; transformers takes the short ones for each sequence that is not.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    named = f"rope type {brief(kind)}"
    check_fields(parameters, ROPE_FIELDS, f"{named}: ", UnsupportedError)
    reader = SCALINGS.get(kind)
    if reader is None:
        raise UnsupportedError(f"{named} is not supported; supported: {', '.join(SCALINGS)}")
    try:
        base = float(parameters.get("rope_theta", 10000.0))
        width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            spec = reader(base, width, max_position, parameters, max_model_len)
    except KeyError as e:
        raise UnsupportedError(f"{named} needs the parameter {e.args[0]!r}, which config.json does not give") from e
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UnsupportedError(f"{named} cannot be built from {_told(parameters)}: {e}; correct config.json") from e
    if not all(map(math.isfinite, (*spec.frequencies, spec.magnitude))):
        raise UnsupportedError(f"{named} with {_told(parameters)} gives frequencies that are not finite; correct config.json")
    if not 1 <= len(spec.frequencies) <= head_dim // 2:
        raise UnsupportedError(f"rope turns pairs, and {width} of the {head_dim} widths of a head are to be turned; correct head_dim or "
                               "partial_rotary_factor in config.json")
    return spec


def _told(parameters: dict) -> str:
    return ", ".join(f"{name} {brief(value)}" for name, value in parameters.items() if name in ROPE_FIELDS)


def _powers(base: float, width: int) -> list[np.float32]:
    """base ** (i / width) for i = 0, 2, ..., rounded to float32 where torch rounds it.

    All that follows stays in float32, in torch's order: models were trained with those numbers, and a frequency that is off
    by half a unit in the last place turns a key at position 30000 by 1e-3 too much.
    """
    return [np.float32(base ** float(np.float32(i / width))) for i in range(0, width, 2)]


def _plain(base: float, width: int) -> list[np.float32]:
    return [1 / power for power in _powers(base, width)]


def _spec(frequencies, magnitude: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(float(f) for f in frequencies), magnitude)


def _default(base, width, max_position, p, max_model_len):
    return _spec(_plain(base, width))


def _linear(base, width, max_position, p, max_model_len):
    return _spec(f / p["factor"] for f in _plain(base, width))


def _dynamic(base, width, max_position, p, max_model_len):
    length = max(max_model_len or max_position, max_position)
    base *= (p["factor"] * length / max_position - (p["factor"] - 1)) ** (width / (width - 2))
    return _spec(_plain(base, width))


def _llama3(base, width, max_position, p, max_model_len):
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    trained = p.get("original_max_position_embeddings", max_position)

    def scaled(frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high:
            return frequency
        if wavelength > trained / low:
            return frequency / factor
        smooth = (trained / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return _spec(scaled(f) for f in _plain(base, width))


def _yarn(base, width, max_position, p, max_model_len):
    """YaRN (arXiv:2309.00071): interpolate the slow frequencies, keep the fast ones, ramp in between."""
    trained = p.get("original_max_position_embeddings", max_position)
    factor = p["factor"] if "original_max_position_embeddings" not in p else p.get("factor", max_position / trained)

    def magnitude_of(scale, m=1.0):
        return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0

    magnitude = p.get("attention_factor")
    if magnitude is None:
        m, m_all = p.get("mscale"), p.get("mscale_all_dim")
        magnitude = magnitude_of(factor, m) / magnitude_of(factor, m_all) if m and m_all else magnitude_of(factor)

    def pair_turning(rotations):
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(p.get("beta_fast") or 32), pair_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001

    def scaled(i, power):
        keep = 1 - np.clip((np.float32(i) - low) / (high - low), 0, 1)
        return 1 / (factor * power) * (1 - keep) + 1 / power * keep

    return _spec((scaled(i, power) for i, power in enumerate(_powers(base, width))), magnitude)


def _longrope(base, width, max_position, p, max_model_len):
    """LongRoPE (arXiv:2402.13753): each frequency has a factor of its own, one for short sequences and one for long."""
    trained = p.get("original_max_position_embeddings", max_position)
    is_long = (max_model_len or max_position) > trained
    factors = p["long_factor" if is_long else "short_factor"]
    powers, factor = _powers(base, width), p.get("factor", max_position / trained)
    if len(factors) != len(powers):
        raise ValueError(f"{len(factors)} factors for {len(powers)} frequencies")
    magnitude = p.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    if is_long:
        log.warning("longrope: max_model_len is beyond the trained %d tokens, so the long factors serve shorter sequences too; "
                    "set max_model_len=%d for the short ones", trained, trained)
    return _spec((1 / (np.float32(f) * power) for f, power in zip(factors, powers, strict=True)), magnitude)


SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
