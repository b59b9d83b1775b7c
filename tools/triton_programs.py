"""The Triton kernels as programs for compile_gpu.py."""
from functools import partial

import jax.numpy as jnp

from pallas_kernels import triton_attention as ta
from pallas_kernels import triton_matmul as tm
from pallas_kernels import triton_rows as tr
from pallas_kernels.ragged import Ragged


def programs(array):
    """(name, function, arguments) of every Triton kernel, over dtypes, tiles, widths and schedules."""
    bf16, f16, f32, i32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32
    for m, n, k, dtype in ((1, 4096, 4096, bf16), (64, 4096, 14336, f16), (2048, 4096, 14336, bf16), (2048, 576, 1536, f16),
                           (8, 100, 890, bf16), (1, 576, 1536, f32), (512, 576, 1536, f32)):
        yield f"matmul {m}x{n}x{k} {dtype.__name__}", tm.matmul, (array((m, k), dtype), array((n, k), dtype), array((n,), dtype))
    for m in (1, 256):
        yield f"logits {m}x49152x576", partial(tm.matmul, out_dtype=f32), (array((m, 576), bf16), array((49152, 576), bf16))
    for m, activation, dtype in ((1, "silu", bf16), (64, "silu", bf16), (2048, "silu", bf16), (2048, "gelu_tanh", f16),
                                 (512, "silu", f32)):
        f = lambda x, g, u, a=activation: tm.gated_mlp(x, g, u, a)
        weight = array((1536, 576), dtype)
        yield f"gated {activation} {m} {dtype.__name__}", f, (array((m, 576), dtype), weight, weight)
    for width in (64, 576, 4096, 5000):
        yield f"rms_norm {width}", partial(tr.rms_norm, eps=1e-5), (array((64, width), bf16), array((width,), bf16))
    yield "log_sum_exp", tr.log_sum_exp, (array((64, 128256), f32),)
    for vocab in (128256, 50257):
        yield f"tail_sums {vocab}", tr.tail_sums, (array((64, vocab), i32), array((64, vocab), f32), array((64, 15), i32))
        yield f"tail_counts {vocab}", lambda order, at_least: tr.tail_sums(order, None, at_least), (array((64, vocab), i32), array((64, 15), i32))
    pages = array((512, 16, 3, 64), bf16)
    yield "write_kv", ta.write_kv, (pages, pages, array((13, 3, 64), bf16), array((13, 3, 64), bf16), array((13,), i32))
    for width, group, page, window, softcap, dtype in (
            (64, 3, 16, None, None, bf16), (80, 8, 32, None, 50.0, f16), (96, 1, 16, 1024, None, bf16), (128, 4, 64, None, None, bf16),
            (128, 7, 16, 1024, 50.0, bf16), (256, 8, 32, 1024, 50.0, bf16), (64, 3, 16, None, None, f32), (128, 4, 16, None, None, f32)):
        kv = array((512, page, 2, width), dtype)
        for kind, t, s in (("decode", 4, 4), ("decode in runs", 4, 4), ("prefill", 256, 8)):
            ragged = Ragged(array((t,), i32), array((t,), i32), array((s,), i32), array((s, 4096 // page), i32),
                            array((s + 1,), i32) if kind == "prefill" else None)
            run = {"decode": None, "decode in runs": 2, "prefill": "auto"}[kind]
            f = partial(ta.attention, scale=width ** -0.5, window=window, softcap=softcap, run=run)
            name = f"attention {kind} H={width} G={group} page={page} window={window} softcap={softcap} {dtype.__name__}"
            yield name, f, (array((t, 2 * group, width), dtype), kv, kv, ragged)
