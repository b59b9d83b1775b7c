"""The Mosaic kernels as programs for compile_gpu.py."""
from functools import partial

import jax.numpy as jnp

from pallas_kernels import mosaic_attention as ma
from pallas_kernels import mosaic_grouped as mg
from pallas_kernels import mosaic_kv
from pallas_kernels import mosaic_matmul as mm
from pallas_kernels import mosaic_rows as mr
from pallas_kernels import mosaic_tail as mt
from pallas_kernels.dispatch import WAYS
from pallas_kernels.ragged import Ragged


def programs(array):
    """(name, function, arguments) of every Mosaic kernel, over dtypes, widths and schedules."""
    bf16, f16, f32, i32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32
    for m, n, k, dtype in ((1, 4096, 4096, bf16), (64, 4096, 14336, f16), (128, 1024, 4096, bf16), (2048, 4096, 14336, bf16),
                           (8, 128, 896, bf16)):
        yield f"matmul {m}x{n}x{k}", mm.matmul, (array((m, k), dtype), array((n, k), dtype), array((n,), dtype))
    for m, n, k, dtype in ((1, 4096, 4096, bf16), (128, 4096, 14336, bf16), (2048, 4096, 14336, bf16), (256, 576, 1536, f16)):
        f = lambda x, w, r: mm.matmul(x, w, residual=r)
        yield f"matmul with residual {m}x{n}x{k}", f, (array((m, k), dtype), array((n, k), dtype), array((m, n), dtype))
    f = lambda x, w, r: mm.matmul(x, w, residual=r, out_dtype=f32)
    yield "matmul with float32 residual 256x576x1536", f, (array((256, 1536), bf16), array((576, 1536), bf16), array((256, 576), f32))
    for m, widths, k in ((1, (4096, 1024, 1024), 4096), (64, (896, 128, 128), 896), (2048, (4096, 1024, 1024), 4096)):
        weights, biases = [array((n, k), bf16) for n in widths], [array((n,), bf16) for n in widths]
        yield f"matmuls {m}x{'+'.join(map(str, widths))}x{k}", mm.matmuls, (array((m, k), bf16), weights, biases)
    for m, n, k, dtype in ((1, 4096, 4096, bf16), (64, 4096, 14336, bf16), (128, 896, 4864, f16), (64, 576, 1536, bf16)):
        f = lambda x, w, r, norm: mm.matmul_norm(x, w, None, residual=r, norm=norm, eps=1e-5)
        yield f"matmul and norm {m}x{n}x{k}", f, (array((m, k), dtype), array((n, k), dtype), array((m, n), dtype), array((n,), dtype))
    for m in (1, 256):
        yield f"logits {m}x128256x4096", partial(mm.matmul, out_dtype=f32), (array((m, 4096), bf16), array((128256, 4096), bf16))
    for m, activation in ((1, "silu"), (2048, "silu"), (64, "gelu_tanh"), (2048, "gelu_tanh"), (64, "relu"), (64, "gelu")):
        f = lambda x, g, u, a=activation: mm.gated_mlp(x, g, u, a)
        yield f"gated {activation} {m}", f, (array((m, 4096), bf16), array((14336, 4096), bf16), array((14336, 4096), bf16))
    for t, e, n, k, dtype in ((2, 8, 4096, 14336, bf16), (16, 128, 2048, 768, f16), (4096, 8, 4096, 14336, bf16),
                              (65536, 128, 768, 2048, bf16)):
        x, w, sizes = array((t, k), dtype), array((e, n, k), dtype), array((e,), i32)
        yield f"grouped matmul {t}x{n}x{k} E={e}", mg.grouped_matmul, (x, w, sizes)
        if t <= 16:  # split and in turn: to float32 there is no third kernel
            yield f"grouped matmul to float32 {t}x{n}x{k} E={e}", partial(mg.grouped_matmul, out_dtype=f32), (x, w, sizes)
        f = lambda x, g, u, sizes: mg.grouped_gated_mlp(x, g, u, sizes, "silu")
        yield f"grouped gated silu {t}x{n}x{k} E={e}", f, (x, w, w, sizes)
    for width in (64, 128, 576, 4096):
        yield f"rms_norm {width}", partial(mr.rms_norm, eps=1e-5), (array((64, width), bf16), array((width,), bf16))
    yield "log_sum_exp", mr.log_sum_exp, (array((64, 128256), f32),)
    for vocab in (128256, 151936, 50257):  # the last: padded
        order, weight, thresholds = array((64, vocab), i32), array((64, vocab), f32), array((64, WAYS - 1), i32)
        yield f"tail_sums {vocab}", mt.tail_sums, (order, weight, thresholds)
        yield f"tail_counts {vocab}", lambda order, thresholds: mt.tail_sums(order, None, thresholds), (order, thresholds)
    pages = array((512, 16, 8, 128), bf16)
    yield "write_kv", mosaic_kv.write_kv, (pages, pages, array((13, 8, 128), bf16), array((13, 8, 128), bf16), array((13,), i32))
    # 128 is the width of most models and 256 has two groups for one tile: the others in two cases of four.
    for width in (64, 80, 96, 128, 256):
        cases = (4, 64, None, None), (7, 16, 1024, 50.0), (1, 16, None, None), (8, 32, 1024, None)
        for group, page, window, softcap in cases if width >= 128 else cases[:2]:
            kv = array((512, page, 4, width), bf16)
            for kind, t, s in (("decode", 4, 4), ("decode in runs", 4, 4), ("prefill", 256, 8)):
                ragged = Ragged(array((t,), i32), array((t,), i32), array((s,), i32), array((s, 4096 // page), i32),
                                array((s + 1,), i32) if kind == "prefill" else None)
                run = {"decode": None, "decode in runs": 2, "prefill": "auto"}[kind]
                f = partial(ma.attention, scale=width ** -0.5, window=window, softcap=softcap, run=run)
                name = f"attention {kind} H={width} G={group} page={page} window={window} softcap={softcap}"
                yield name, f, (array((t, 4 * group, width), bf16), kv, kv, ragged)
    for width in (64, 80, 96, 128, 256):
        cases = (1, None, None, bf16), (4, 64, 50.0, f16), (1, 64, None, f16), (4, None, None, bf16)
        for group, window, softcap, dtype in cases if width >= 128 else cases[:2]:
            f = partial(ma.attend_bidirectional, scale=width ** -0.5, window=window, softcap=softcap)
            kv = array((512, 4, width), dtype)
            yield (f"encoder attention H={width} G={group} window={window} softcap={softcap} {dtype.__name__}", f,
                   (array((512, 4 * group, width), dtype), kv, kv, array((17,), i32)))
