"""The sections of gpu_check.py that measure: the card's ceilings, each kernel, the 8B shape as the engine runs it, and torch."""
import subprocess
import sys
import time
from functools import partial

from gpu_check_bits import equal, random


def seconds_of(function, *arguments, repeats=5, queued=10):
    """Median seconds of one call that is compiled and warm, of `queued` calls sent one after another: the host's part is hidden."""
    import jax
    import numpy as np
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / queued)
    return float(np.median(times))


def beside(out, name, function, *arguments, **per_s):
    """Adds another's time for the same work to `out`, or why there is none: what was measured before is kept."""
    try:
        s = seconds_of(function, *arguments)
        out[name] = {"us": s * 1e6} | {unit: amount / s for unit, amount in per_s.items()}
    except Exception as error:  # noqa: BLE001  cuDNN may be absent or refuse
        out[name] = {"none": str(error)[:500]}


def machine(report):
    """The card, the versions, and the two ceilings: copy bandwidth and matmul rate."""
    import jax
    import jax.numpy as jnp
    import jaxlib
    device, seconds = jax.devices()[0], partial(seconds_of, **report.calls)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout.strip() if not report.small else "simulated"
    report.add("versions", jax=jax.__version__, jaxlib=jaxlib.__version__, python=sys.version.split()[0], device=device.device_kind,
               platform=device.platform, capability=str(getattr(device, "compute_capability", None)), driver=driver)
    n = 1 << (10 if report.small else 30)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    report.guard("copy", lambda: {"bytes_per_s": 4 * n / seconds(copy, jnp.zeros(n, jnp.bfloat16))})
    m = 256 if report.small else 8192
    product = jax.jit(lambda a, b: a @ b)
    a = random(0, (m, m), jnp.bfloat16)
    report.guard("xla matmul", lambda: {"flop_per_s": 2 * m ** 3 / seconds(product, a, a)})


def kernels(report):
    """Each kernel's time, its bytes and flops per second, and what XLA or cuDNN need for the same on contiguous data."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels.ragged import Ragged
    seconds = partial(seconds_of, **report.calls)
    for m in (1,) if report.small else (1, 64, 2048):
        def gated(m=m):
            f, d, count = (136, 320, 1) if report.small else (14336, 4096, 4)
            x, ws = random(0, (m, d), "bfloat16"), [random(i, (f, d), "bfloat16", d ** -0.5) for i in range(2 * count)]
            pairs = list(zip(ws[::2], ws[1::2]))
            s = seconds(jax.jit(lambda x, pairs: [mm.gated_mlp(x, g, u, "silu") for g, u in pairs]), x, pairs) / count
            return {"us": s * 1e6, "bytes_per_s": 4 * f * d / s, "flop_per_s": 4 * m * f * d / s}
        report.guard(f"gated {m}", gated)

    def decode(rows, context, page, kv_heads, group, width):
        pages = -(-context // page)
        kv = random(0, (rows * pages, page, kv_heads, width), "bfloat16")
        q = random(1, (rows, kv_heads * group, width), "bfloat16")
        table = jax.random.permutation(jax.random.key(2), rows * pages).astype(jnp.int32).reshape(rows, pages)
        at = jnp.full(rows, context - 1, jnp.int32)
        ragged, moved, out = Ragged(at, at, at + 1, table, None), 4 * rows * context * kv_heads * width, {}
        for run in ("auto", None, 1, 4):
            s = seconds(jax.jit(lambda q, k, v, r, run=run: ma.attention(q, k, v, r, scale=width ** -0.5, run=run)), q, kv, kv + 1, ragged)
            out[f"run {run}"] = {"us": s * 1e6, "bytes_per_s": moved / s}
        if not report.small:
            flat = kv.reshape(rows, context, kv_heads, width)
            f = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))
            beside(out, "cudnn contiguous", f, q[:, None], flat, flat + 1, bytes_per_s=moved)
        return out
    for options in [(2, 40, 16, 1, 2, 64)] if report.small else [
            (64, 4096, 64, 8, 4, 128), (1, 4096, 64, 8, 4, 128), (8, 32768, 64, 8, 4, 128), (64, 4096, 16, 8, 4, 128)]:
        report.guard(f"decode {options}", lambda: decode(*options))

    def prefill(tokens, kv_heads, group, width):
        from pallas_kernels.ragged import contiguous
        ragged, pages = contiguous(1, tokens, 64)
        q, kv = random(0, (tokens, kv_heads * group, width), "bfloat16"), random(1, (pages, 64, kv_heads, width), "bfloat16")
        s = seconds(jax.jit(lambda q, k, v: ma.attention(q, k, v, ragged, scale=width ** -0.5)), q, kv, kv + 1)
        flops, out = 2 * tokens * tokens * kv_heads * group * width, {}
        out["mosaic"] = {"us": s * 1e6, "flop_per_s": flops / s}
        if not report.small:
            flat = kv.reshape(1, -1, kv_heads, width)[:, :tokens]
            f = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"))
            beside(out, "cudnn contiguous", f, q[None], flat, flat + 1, flop_per_s=flops)
        return out
    for tokens in (70,) if report.small else (2048, 8192):
        report.guard(f"prefill {tokens}", lambda: prefill(tokens, *((1, 2, 64) if report.small else (8, 4, 128))))

    xla = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)
    shapes = [(1, 136, 320)] if report.small else [(m, n, k) for n, k in ((4096, 4096), (4096, 14336), (1024, 4096), (14336, 4096))
                                                  for m in (1, 64, 256, 2048)]
    for m, n, k in shapes:
        def products(m=m, n=n, k=k):
            count = 1 if report.small else max(4, (400 << 20) // (2 * n * k))  # more weights than L2 holds
            x, ws = random(m, (m, k), "bfloat16"), [random(i, (n, k), "bfloat16", k ** -0.5) for i in range(count)]
            out = {}
            for name, f in (("mosaic", mm.matmul), ("mosaic_in_turn", lambda x, w: mm.matmul(x, w, split=False)), ("xla", xla)):
                s = seconds(jax.jit(lambda x, ws, f=f: [f(x, w) for w in ws]), x, ws) / count
                out[name] = {"us": s * 1e6, "bytes_per_s": 2 * (n * k + m * k + m * n) / s, "flop_per_s": 2 * m * n * k / s}
            return out
        report.guard(f"matmul {m}x{n}x{k}", products)

    def tree(m, n, k):
        """The tree's own cut of K beside others, and K in one piece: what one fixed tree costs is its time over the least."""
        count = 1 if report.small else max(4, (400 << 20) // (2 * n * k))
        x, ws = random(m, (m, k), "bfloat16"), [random(i, (n, k), "bfloat16", k ** -0.5) for i in range(count)]
        groups, out = mm.checked(x, *ws), {}
        whole = -(-k // 128) * 128
        for chunk in sorted({c for c in (256, 512, 1024, 2048, mm.chunk_length(k)) if c < k} | {whole}):
            for split in (False, True) if chunk < whole and m <= 2 * mm.ROWS else (False,):
                def product(x, w, chunk=chunk, split=split):
                    part, = mm.launch(x, [w], [], x.dtype, groups=groups, stages=mm.STAGES[groups], split=split, chunk=chunk)
                    return mm.sum_of_parts(part, m, n, None, x.dtype) if split else part
                us = seconds(jax.jit(lambda x, ws: [product(x, w) for w in ws]), x, ws) / count * 1e6
                out[f"{'split' if split else 'in turn'} {chunk}"] = us
        own = min(us for name, us in out.items() if name.endswith(f" {mm.chunk_length(k)}"))
        return {"us": out, "chunk": mm.chunk_length(k), "cost": own / min(out.values()) - 1}
    for options in [(1, 136, 320)] if report.small else [(1, 4096, 4096), (64, 4096, 14336), (64, 6144, 4096), (2048, 4096, 14336)]:
        report.guard(f"tree {options}", lambda: tree(*options))


def model(report):
    """The 8B shape with random weights, run by the engine's programs: step and draw times, and bits end to end."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from compile_gpu import draws
    from jaxllm.config import EngineConfig, LayerSpec, ModelConfig, RopeSpec
    from jaxllm.engine import runner
    from jaxllm.engine.batch import Batch
    from jaxllm.models import decoder
    from pallas_kernels import dispatch
    from pallas_kernels.ragged import Ragged
    width, mlp, heads, kv_heads, head, depth, vocab = (64, 128, 2, 1, 64, 1, 256) if report.small else (4096, 14336, 32, 8, 128, 32, 128256)
    page, context, most = (16, 20, 2) if report.small else (16, 1024, 256)
    spec = LayerSpec(RopeSpec(tuple(500000.0 ** (-2 * i / head) for i in range(head // 2))))
    cfg = ModelConfig("LlamaForCausalLM", vocab, width, mlp, heads, kv_heads, head, 1e-5, 8192, (spec,) * depth)
    pages = -(-(context + 1) // page)
    config = EngineConfig(max_model_len=8192, max_num_seqs=most, max_num_batched_tokens=8192, num_pages=most * pages, page_size=page)
    # Weights and pages are made one by one on the device; norms are one.
    leaves, tree = jax.tree.flatten(decoder.template(cfg, jnp.bfloat16))
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5, static_argnums=1)
    params = jax.tree.unflatten(tree, [jnp.ones(a.shape, a.dtype) if len(a.shape) == 1 else make(jax.random.key(i), a.shape)
                                       for i, a in enumerate(leaves)])
    weights = sum(a.nbytes for a in jax.tree.leaves(params)) - params.embedding.nbytes
    last = jnp.zeros(most, jnp.int32)
    kernel_sets = {"mosaic": dispatch._mosaic()} | ({} if report.small else {"reference": dispatch.SERVING})

    def filled():
        made = [make(jax.random.key(1000 + i), (most * pages, page, kv_heads, head)) for i in range(2 * depth)]
        return decoder.KVCache(tuple(made[:depth]), tuple(made[depth:]))

    def batch(tokens, ragged, rows=None):
        return Batch(tokens, jnp.full(tokens.shape, -1, jnp.int32), ragged, rows)

    def decode_batch(rows):
        at = jnp.full(rows, context, jnp.int32)
        table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
        slots = table[:, context // page] * page + context % page
        return batch(jnp.arange(rows, dtype=jnp.int32) % vocab, Ragged(at, slots, at + 1, table, None))

    def timed(forward, cache, step, repeats):
        """(times, logits, cache): "ms" of steps in a queue, "ms_alone" of one that is waited for. A step rewrites its own slots."""
        def run(count):
            nonlocal cache
            start = time.perf_counter()
            for _ in range(count):
                _, logits, cache = forward(params, cache, last, step)
            logits.block_until_ready()
            return (time.perf_counter() - start) / count, logits
        first, logits = run(1)
        kept = np.asarray(logits)
        # The second call takes what the first gave back: long, it has compiled again (the simulator does, once).
        return {"first_s": first, "second_s": run(1)[0], "ms_alone": run(1)[0] * 1e3, "ms": run(repeats)[0] * 1e3}, kept, cache

    for name, kernels in kernel_sets.items():
        programs, kept = runner.programs(cfg, kernels), {}
        for rows in (1, most) if report.small else (1, 8, 64, 256) if name == "mosaic" else (1, 64):
            def decoding():
                out, kept[rows], _ = timed(programs.forward, filled(), decode_batch(rows), 2 if report.small else 16)
                live = 4 * rows * context * kv_heads * head * depth
                return out | {"bytes_to_read": weights + live, "bytes_per_s": (weights + live) / out["ms"] * 1e3,
                              "tokens_per_s": rows / out["ms"] * 1e3}
            report.guard(f"{name} decode {rows} rows, context {context}", decoding)
        if 1 in kept:
            worst = {str(r): equal(logits[:1], kept[1]) for r, logits in kept.items() if r > 1}
            report.add(f"{name} logits of row 0 alone and in a crowd", differing=sum(worst.values()) if name == "mosaic" else 0, where=worst)

        tokens = 24 if report.small else 2048
        at = jnp.arange(tokens, dtype=jnp.int32)
        table = jnp.arange(-(-tokens // page), dtype=jnp.int32)[None]
        ragged = Ragged(at, at, jnp.asarray([tokens], jnp.int32), table, jnp.asarray([0, tokens], jnp.int32))

        def prefilling():
            """And the last token of that prompt again as a decode step, on the cache that the prefill wrote."""
            final = jnp.asarray([tokens - 1], jnp.int32)
            out, logits, cache = timed(programs.forward, filled(), batch(at % vocab, ragged, final), 1 if report.small else 4)
            again = programs.forward(params, cache, last, batch(final % vocab, Ragged(final, final, final + 1, table, None)))[1]
            worst = equal(again, logits)
            return out | {"flop_per_s": weights * tokens / out["ms"] * 1e3, "tokens_per_s": tokens / out["ms"] * 1e3,
                          "differing": worst if name == "mosaic" else 0, "decode_differs_in": worst}
        report.guard(f"{name} prefill {tokens}", prefilling)

        drawn = {}
        for rows in (1, 2) if report.small else (1, 64, 256) if name == "mosaic" else (64,):
            logits = random(5, (most, vocab), "float32")[:rows]
            for kind, inputs, features in draws(vocab, rows, config, False):
                def drawing():
                    state = jnp.zeros(most, jnp.int32)

                    def draw():
                        nonlocal state
                        out, state = programs.draw(logits, state, inputs, features=features)
                        return out
                    drawn[kind, rows] = jax.tree.map(np.asarray, draw())
                    first = drawn.get((kind, 1), drawn[kind, rows])
                    worst = sum(equal(a[:1], b[:1]) for a, b in zip(jax.tree.leaves(drawn[kind, rows]), jax.tree.leaves(first)))
                    return {"us": seconds_of(draw, **report.calls) * 1e6, "differing": worst}
                report.guard(f"{name} draw {kind} {rows} rows", drawing)


def torch(report):
    """transformers with a static cache under torch.compile, the same shape, bf16, random weights."""
    try:
        import torch as t
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError as error:
        report.add("torch", skipped=str(error))
        return
    report.add("versions", torch=t.__version__, cuda=str(t.version.cuda))
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                         vocab_size=128256, max_position_embeddings=8192)
    if report.small or not t.cuda.is_available():
        report.add("torch", skipped="no CUDA")
        return
    with t.device("cuda"):
        t.set_default_dtype(t.bfloat16)
        net = LlamaForCausalLM(config).eval()
        forward = t.compile(net.forward, mode="reduce-overhead", fullgraph=True)
        for rows in (1, 64):
            def decoding(rows=rows):
                cache = StaticCache(config=config, max_batch_size=rows, max_cache_len=1088, device="cuda", dtype=t.bfloat16)
                ids, at = t.ones((rows, 1), dtype=t.long), t.tensor([1024])
                times = []
                with t.no_grad():
                    for i in range(12):
                        t.cuda.synchronize()
                        start = time.perf_counter()
                        forward(input_ids=ids, past_key_values=cache, cache_position=at, use_cache=True)
                        t.cuda.synchronize()
                        times.append(time.perf_counter() - start)
                return {"ms": sorted(times[4:])[4] * 1e3, "first_s": times[0]}
            report.guard(f"torch decode {rows} rows, context 1024", decoding)


