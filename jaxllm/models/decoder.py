"""The decoder-only transformer as a pure function over a pytree of weights.

    hidden, cache = forward(cfg, params, cache, tokens, ragged)
    logits = unembed(cfg, params, hidden)

Families differ in `ModelConfig` and in their weight rules. The same `forward` trains, serves, and is differentiated.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.config import LayerSpec, ModelConfig
from jaxllm.layers.linear import Linear, linear_norm, linears
from jaxllm.layers.rope import rotate
from pallas_kernels.dispatch import REFERENCE, Kernels
from pallas_kernels.probe import Shapes
from pallas_kernels.ragged import Ragged, contiguous

PAGE_SIZE = 16  # of the throw-away cache of `whole`


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    attention_norm: jax.Array  # [D]
    q: Linear                  # [N * H, D]
    k: Linear                  # [K * H, D]
    v: Linear                  # [K * H, D]
    o: Linear                  # [D, N * H]
    q_norm: jax.Array | None   # [H]
    k_norm: jax.Array | None   # [H]
    mlp_norm: jax.Array        # [D]
    gate: Linear               # [F, D]
    up: Linear                 # [F, D]
    down: Linear               # [D, F]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Decoder:
    embedding: jax.Array        # [V, D]
    layers: tuple[Layer, ...]
    norm: jax.Array             # [D]
    head: jax.Array | None      # [V, D]; None: tied to the embedding


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """One pair of page arrays for each layer, so that a step can update them in place."""

    k: tuple[jax.Array, ...]  # each [num_pages, page_size, K, H]
    v: tuple[jax.Array, ...]


def empty_cache(cfg: ModelConfig, num_pages: int, page_size: int, dtype) -> KVCache:
    """Zeroed pages for `num_pages * page_size` tokens."""
    shape = (num_pages, page_size, cfg.num_kv_heads, cfg.head_dim)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in cfg.layers), tuple(jnp.zeros(shape, dtype) for _ in cfg.layers))


def template(cfg: ModelConfig, dtype) -> Decoder:
    """The shapes and dtypes of the weights, as a pytree of jax.ShapeDtypeStruct."""
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def affine(out, into, bias):
        return Linear(array(out, into), array(out) if bias else None)

    d, f, h = cfg.width, cfg.mlp_width, cfg.head_dim
    q, kv = cfg.num_heads * h, cfg.num_kv_heads * h
    layer = Layer(
        attention_norm=array(d),
        q=affine(q, d, cfg.qkv_bias), k=affine(kv, d, cfg.qkv_bias), v=affine(kv, d, cfg.qkv_bias), o=affine(d, q, cfg.o_bias),
        q_norm=array(h) if cfg.qk_norm else None, k_norm=array(h) if cfg.qk_norm else None,
        mlp_norm=array(d),
        gate=affine(f, d, cfg.mlp_bias), up=affine(f, d, cfg.mlp_bias), down=affine(d, f, cfg.mlp_bias))
    return Decoder(array(cfg.vocab_size, d), (layer,) * len(cfg.layers), array(d), None if cfg.tied else array(cfg.vocab_size, d))


def product_shapes(cfg: ModelConfig) -> Shapes:
    """The matrix products of a model: what a machine is asked about before it promises the bits of their sums."""
    d, f, q, kv = cfg.width, cfg.mlp_width, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    return Shapes(((d, q), (d, kv), (q, d), (d, f), (f, d), (d, cfg.vocab_size)), cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)


def _attention(cfg: ModelConfig, spec: LayerSpec, p: Layer, normed, k_pages, v_pages, ragged: Ragged, kernels: Kernels):
    """What the heads see, [T, N * H], and the pages with keys and values of normed [T, D] written."""
    tokens = normed.shape[0]
    q, k, v = (a.reshape(tokens, -1, cfg.head_dim) for a in linears((p.q, p.k, p.v), normed, kernels))
    if cfg.qk_norm:
        q = kernels.rms_norm(q, p.q_norm, cfg.norm_eps)
        k = kernels.rms_norm(k, p.k_norm, cfg.norm_eps)
    q, k = rotate(q, ragged.positions, spec.rope), rotate(k, ragged.positions, spec.rope)
    out, k_pages, v_pages = kernels.attend(q, k, v, k_pages, v_pages, ragged, scale=cfg.attention_scale,
                                           window=spec.window, softcap=None)
    return out.reshape(tokens, -1), k_pages, v_pages


# A function of its own for jit, so that equal layers are traced and lowered once; XLA puts it in line again.
@partial(jax.jit, static_argnames=("cfg", "spec", "kernels"))
def _layer(p: Layer, x, normed, k_pages, v_pages, ragged: Ragged, next_norm, *, cfg: ModelConfig, spec: LayerSpec, kernels: Kernels):
    """One layer: x [T, D], the same normed, and the layer's pages -> x with the layer's output added, that with the next
    layer's norm [D], and the pages with keys and values written."""
    add_and_norm = partial(linear_norm, kernels=kernels, eps=cfg.norm_eps)
    seen, k_pages, v_pages = _attention(cfg, spec, p, normed, k_pages, v_pages, ragged, kernels)
    x, normed = add_and_norm(p.o, seen, residual=x, norm=p.mlp_norm)
    hidden = kernels.gated_mlp(normed, p.gate.weight, p.up.weight, cfg.activation, gate_bias=p.gate.bias, up_bias=p.up.bias)
    return *add_and_norm(p.down, hidden, residual=x, norm=next_norm), k_pages, v_pages


def forward(cfg: ModelConfig, params: Decoder, cache: KVCache, tokens: jax.Array, ragged: Ragged, *,
            kernels: Kernels = REFERENCE) -> tuple[jax.Array, KVCache]:
    """Hidden states [T, D] after the last norm for tokens int32 [T], and the cache with their keys and values written."""
    x = params.embedding[tokens]
    k_cache, v_cache = [], []
    shared = dataclasses.replace(cfg, layers=())  # what all layers have in common: equal ones are one program
    first, *norms = *(p.attention_norm for p in params.layers), params.norm
    normed = kernels.rms_norm(x, first, cfg.norm_eps)
    for spec, p, k_pages, v_pages, norm in zip(cfg.layers, params.layers, cache.k, cache.v, norms, strict=True):
        x, normed, k_pages, v_pages = _layer(p, x, normed, k_pages, v_pages, ragged, norm, cfg=shared, spec=spec, kernels=kernels)
        k_cache.append(k_pages)
        v_cache.append(v_pages)
    return normed, KVCache(tuple(k_cache), tuple(v_cache))


def unembed(cfg: ModelConfig, params: Decoder, hidden: jax.Array, *, kernels: Kernels = REFERENCE) -> jax.Array:
    """Logits float32 [T, V] of hidden states [T, D]."""
    return kernels.matmul(hidden, params.embedding if params.head is None else params.head, out_dtype=jnp.float32)


def whole(cfg: ModelConfig, params: Decoder, tokens: jax.Array, *, kernels: Kernels = REFERENCE) -> jax.Array:
    """Hidden states [B, T, D] of whole sequences int32 [B, T], through the same forward and a cache of their own."""
    batch, length = tokens.shape
    ragged, num_pages = contiguous(batch, length, PAGE_SIZE)
    cache = empty_cache(cfg, num_pages, PAGE_SIZE, params.embedding.dtype)
    hidden, _ = forward(cfg, params, cache, tokens.reshape(-1), ragged, kernels=kernels)
    return hidden.reshape(batch, length, -1)
