"""Rotary position embedding: the frequencies of each published scaling, and the rotation."""
import math

import jax
import jax.numpy as jnp

from jaxllm.config import RopeSpec
from jaxllm.errors import UnsupportedError


def rotate(x: jax.Array, positions: jax.Array, spec: RopeSpec) -> jax.Array:
    """x [T, heads, H] with the first 2 * len(frequencies) widths of each head turned by its position [T]; x's dtype."""
    half = len(spec.frequencies)
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(spec.frequencies, jnp.float32)
    cos = (jnp.cos(angle) * spec.magnitude)[:, None]  # [T, 1, half]
    sin = (jnp.sin(angle) * spec.magnitude)[:, None]
    wide = x[..., :2 * half].astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half:]], axis=-1)


def rope_spec(head_dim: int, max_position: int, parameters: dict, max_model_len: int | None = None) -> RopeSpec:
    """The frequencies that a Hugging Face `rope_parameters` entry describes.

    `dynamic` scaling depends on the length of the sequence at hand. A cached key cannot be turned again, and the bits of
    a token may not depend on what follows it, so the base is fixed for `max_model_len`: up to the trained length it is the
    unscaled one, beyond it the one that transformers uses for a sequence of exactly that length.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    reader = SCALINGS.get(kind)
    if reader is None:
        raise UnsupportedError(f"rope type {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    base = float(parameters.get("rope_theta", 10000.0))
    width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    try:
        return reader(base, width, max_position, parameters, max_model_len)
    except KeyError as e:
        raise UnsupportedError(f"rope type {kind!r} needs the parameter {e.args[0]!r}, which config.json does not give") from e


def _plain(base: float, width: int) -> list[float]:
    return [base ** (-i / width) for i in range(0, width, 2)]


def _default(base, width, max_position, p, max_model_len):
    return RopeSpec(tuple(_plain(base, width)))


def _linear(base, width, max_position, p, max_model_len):
    return RopeSpec(tuple(f / p["factor"] for f in _plain(base, width)))


def _dynamic(base, width, max_position, p, max_model_len):
    trained = p.get("original_max_position_embeddings") or max_position
    length = max(max_model_len or trained, trained)
    base *= (p["factor"] * length / trained - (p["factor"] - 1)) ** (width / (width - 2))
    return RopeSpec(tuple(_plain(base, width)))


def _llama3(base, width, max_position, p, max_model_len):
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    trained = p["original_max_position_embeddings"]

    def scaled(frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high:
            return frequency
        if wavelength > trained / low:
            return frequency / factor
        smooth = (trained / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return RopeSpec(tuple(scaled(f) for f in _plain(base, width)))


def _yarn(base, width, max_position, p, max_model_len):
    """YaRN (arXiv:2309.00071): interpolate the slow frequencies, keep the fast ones, ramp in between."""
    factor = p["factor"]
    trained = p.get("original_max_position_embeddings") or max_position

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

    def scaled(i, frequency):
        keep = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
        return frequency / factor * (1 - keep) + frequency * keep

    return RopeSpec(tuple(scaled(i, f) for i, f in enumerate(_plain(base, width))), magnitude)


SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
