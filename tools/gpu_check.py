"""Everything that only a card can tell, in at most nine minutes: bits, time against the floor, and the others' time.

    python tools/gpu_check.py --out FILE.json [--minutes 9]

Each section runs in a process of its own, so that a kernel that hangs or a crash costs its section and no more; what a
section measured before is kept. `--small` runs the same code on shapes that a simulator on a CPU can bear, to test this
file; its times mean nothing and are marked so. No network is used; torch and transformers are used where they are installed.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SECTIONS = {"machine": 60, "oracle": 100, "bits": 110, "kernels": 130, "model": 170, "torch": 120}  # seconds at most


class Report:
    """Results of a section, written to its file after each entry."""

    def __init__(self, path, small):
        self.path, self.small, self.entries = Path(path), small, []

    def add(self, name, **values):
        self.entries.append({"name": name, **values})
        self.path.write_text(json.dumps(self.entries))
        print(name, values, flush=True)

    def guard(self, name, function):
        """function() -> dict, or its traceback."""
        try:
            self.add(name, **function())
        except Exception:  # noqa: BLE001  the report goes on and says what happened
            self.add(name, error=traceback.format_exc()[-3000:])


def seconds_of(function, *arguments, repeats=10):
    """Median seconds of one call that is compiled and warm."""
    import jax
    import numpy as np
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def random(seed, shape, dtype, scale=1.0):
    import jax
    return (jax.random.normal(jax.random.key(seed), shape, "float32") * scale).astype(dtype)


def equal(a, b):
    """How many elements differ in their bits."""
    import numpy as np
    a, b = np.asarray(a), np.asarray(b)
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    return int((a.view(kind) != b.view(kind)).sum())


def case(lengths, kv_heads, group, width, page_size, dtype, seed=0):
    """(q of all tokens, k_pages, v_pages, tables) of sequences in pages; what no sequence holds is NaN."""
    import jax.numpy as jnp
    import numpy as np
    rng = np.random.default_rng(seed)
    pages = [-(-n // page_size) for n in lengths]
    order = rng.permutation(sum(pages) + 2)
    tables, at = np.full((len(lengths), max(pages)), order[-1]), 0
    keys = np.full((len(order), page_size, kv_heads, width), np.nan, np.float32)
    values = keys.copy()
    for s, n in enumerate(lengths):
        tables[s, :pages[s]] = order[at:at + pages[s]]
        at += pages[s]
        for store in (keys, values):
            flat = rng.standard_normal((pages[s] * page_size, kv_heads, width), np.float32)
            flat[n:] = np.nan
            store[tables[s, :pages[s]]] = flat.reshape(pages[s], page_size, kv_heads, width)
    q = [jnp.asarray(rng.standard_normal((n, kv_heads * group, width), np.float32), dtype) for n in lengths]
    return q, jnp.asarray(keys, dtype), jnp.asarray(values, dtype), tables


def step(q, tables, parts, decode=False):
    """(queries, Ragged) over parts [(sequence, first, last + 1)]."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.ragged import Ragged
    position = np.concatenate([np.arange(a, b) for _, a, b in parts]).astype(np.int32)
    starts = None if decode else jnp.asarray(np.cumsum([0] + [b - a for _, a, b in parts]), jnp.int32)
    return jnp.concatenate([q[s][a:b] for s, a, b in parts]), Ragged(
        jnp.asarray(position), jnp.full(len(position), 2 ** 30, jnp.int32), jnp.asarray([b for _, _, b in parts], jnp.int32),
        jnp.asarray(np.stack([tables[s] for s, _, _ in parts]), jnp.int32), starts)


def packed(lengths, kv_heads, group, width, dtype="bfloat16"):
    """q, k, v [T, ., H] of sequences that follow one another, with eight rows of NaN at the end, and their starts."""
    import jax.numpy as jnp
    import numpy as np
    t = sum(lengths)
    q, k, v = (random(i, (t + 8, n, width), "float32").at[t:].set(np.nan).astype(dtype) for i, n in enumerate((kv_heads * group, kv_heads, kv_heads)))
    return q, k, v, jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


def experts(sizes, n, k):
    """Rows by expert with five rows of NaN behind them, the experts' gate and up, and the sizes."""
    import jax.numpy as jnp
    import numpy as np
    x = random(0, (sum(sizes) + 5, k), "float32").at[sum(sizes):].set(np.nan).astype("bfloat16")
    gate, up = (random(i, (len(sizes), n, k), "bfloat16", k ** -0.5) for i in (1, 2))
    return x, gate, up, jnp.asarray(sizes, jnp.int32)


def machine(report):
    """The card, the versions, and the two ceilings: copy bandwidth and matmul rate."""
    import jax
    import jax.numpy as jnp
    import jaxlib
    device = jax.devices()[0]
    driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout.strip() if not report.small else "simulated"
    report.add("versions", jax=jax.__version__, jaxlib=jaxlib.__version__, python=sys.version.split()[0], device=device.device_kind,
               platform=device.platform, capability=str(getattr(device, "compute_capability", None)), driver=driver)
    n = 1 << (10 if report.small else 30)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    report.guard("copy", lambda: {"bytes_per_s": 4 * n / seconds_of(copy, jnp.zeros(n, jnp.bfloat16))})
    m = 256 if report.small else 8192
    product = jax.jit(lambda a, b: a @ b)
    a = random(0, (m, m), jnp.bfloat16)
    report.guard("xla matmul", lambda: {"flop_per_s": 2 * m ** 3 / seconds_of(product, a, a)})


def oracle(report):
    """Every kernel against float64, on the ragged lengths that break things."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_grouped as mg
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels import mosaic_rows as mr
    exact = lambda a: np.asarray(a.astype(jnp.float32)).astype(np.float64)
    shapes = [(1, 136, 320)] if report.small else [(1, 4096, 4096), (70, 4096, 14336), (300, 1000, 2112), (3, 50, 100)]
    for m, n, k in shapes:
        def check(m=m, n=n, k=k):
            x, w, b = random(m, (m, k), "bfloat16"), random(1, (n, k), "bfloat16", k ** -0.5), random(2, (n,), "bfloat16")
            got = mm.matmul(x, w, b, out_dtype=jnp.float32)
            return {"max_difference": float(np.abs(exact(got) - exact(x) @ exact(w).T - exact(b)).max())}
        report.guard(f"matmul {m}x{n}x{k}", check)

    def rows(width):
        x = random(width, (5, width), "float32")
        wide = np.asarray(x, np.float64)
        norm = exact(mr.rms_norm(x.astype("bfloat16"), jnp.ones(width, jnp.bfloat16), 1e-5))
        short = exact(x.astype("bfloat16"))
        return {"log_sum_exp": float(np.abs(np.asarray(mr.log_sum_exp(x)) - np.log(np.exp(wide).sum(-1))).max()),
                "rms_norm": float(np.abs(norm - short / np.sqrt((short ** 2).mean(-1, keepdims=True) + 1e-5)).max())}
    for width in (576,) if report.small else (64, 576, 4096, 128256):
        report.guard(f"rows {width}", lambda: rows(width))

    def attention(width, group, page, window, softcap):
        lengths = [1, page - 1, page, page + 1] + ([] if report.small else [1000])
        q, k, v, tables = case(lengths, 2, group, width, page, jnp.bfloat16)
        parts = [(s, 0, n) for s, n in enumerate(lengths)]
        queries, ragged = step(q, tables, parts)
        got = exact(ma.attention(queries, k, v, ragged, scale=width ** -0.5, window=window, softcap=softcap))
        worst, at = 0.0, 0
        for s, n in enumerate(lengths):
            flat = lambda pages: np.repeat(exact(pages)[tables[s]].reshape(-1, 2, width)[:n], group, 1)
            score = np.einsum("qnh,knh->nqk", exact(q[s]), flat(k)) * width ** -0.5
            score = score if softcap is None else np.tanh(score / softcap) * softcap
            own, seen = np.arange(n)[:, None], np.arange(n)
            score = np.where((seen <= own) & (seen > own - (window or n + 1)), score, -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            worst = max(worst, float(np.abs(got[at:at + n] - np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), flat(v))).max()))
            at += n
        return {"max_difference": worst}
    for options in [(64, 3, 16, None, None)] if report.small else [
            (w, g, p, win, cap) for w in (64, 80, 96, 128, 256) for g, p, win, cap in ((1, 16, None, None), (4, 64, 100, None), (8, 32, None, 20.0))]:
        report.guard(f"attention {options}", lambda: attention(*options))

    def encoder(width, group, window, softcap):
        lengths = [1, 7, 40] if report.small else [1, 7, 8, 129, 0, 1000, 300]
        q, k, v, starts = packed(lengths, 2, group, width)
        got = exact(ma.attend_bidirectional(q, k, v, starts, scale=width ** -0.5, window=window, softcap=softcap))
        wide, worst, at = [exact(a) for a in (q, k, v)], 0.0, 0
        for n in filter(None, lengths):
            own_q, own_k, own_v = (a[at:at + n] for a in wide)
            score = np.einsum("qnh,knh->nqk", own_q, np.repeat(own_k, group, 1)) * width ** -0.5
            score = score if softcap is None else np.tanh(score / softcap) * softcap
            score = np.where(np.abs(np.arange(n)[:, None] - np.arange(n)) <= (n if window is None else window), score, -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            worst = max(worst, float(np.abs(got[at:at + n] - np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), np.repeat(own_v, group, 1))).max()))
            at += n
        return {"max_difference": worst, "differing": int((got[at:] != 0).sum())}
    for options in [(64, 1, None, None)] if report.small else [
            (w, g, win, cap) for w in (64, 80, 96, 128, 256) for g, win, cap in ((1, None, None), (1, 64, None), (4, 64, 20.0))]:
        report.guard(f"encoder attention {options}", lambda: encoder(*options))

    def grouped(sizes, n, k):
        x, w, _, group_sizes = experts(sizes, n, k)
        got, cuts = exact(mg.grouped_matmul(x, w, group_sizes, out_dtype=jnp.float32)), np.cumsum([0, *sizes])
        want = np.concatenate([exact(x[cuts[e]:cuts[e + 1]]) @ exact(w[e]).T for e in range(len(sizes))])
        return {"max_difference": float(np.abs(got[:cuts[-1]] - want).max()), "differing": int((got[cuts[-1]:] != 0).sum())}
    for options in [([1, 0, 9], 136, 320)] if report.small else [([1, 0, 9, 300], 4096, 2112), ([0, 1, 1, 0], 1000, 14336)]:
        report.guard(f"grouped matmul {options}", lambda: grouped(*options))


def bits(report):
    """One row's bits in every number of rows, schedule and kind of step: `differing` must be 0 everywhere."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_grouped as mg
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels import mosaic_rows as mr
    from pallas_kernels.rounding import add
    shapes = [(136, 320)] if report.small else [(4096, 4096), (4096, 14336), (896, 896), (576, 1536), (128256, 4096)]
    counts = (1, 66) if report.small else (1, 2, 3, 7, 8, 16, 33, 64, 65, 100, 128, 129, 256, 511)
    for n, k in shapes:
        def products(n=n, k=k):
            x, w = random(n, (512 if not report.small else 70, k), "bfloat16"), random(k, (n, k), "bfloat16", k ** -0.5)
            want = mm.matmul(x, w, out_dtype=jnp.float32)
            differ = {str(m): equal(mm.matmul(x[:m], w, out_dtype=jnp.float32), want[:m]) for m in counts}
            differ |= {f"split {m}": equal(mm.matmul(x[:m], w, out_dtype=jnp.float32, split=True), want[:m]) for m in counts if m <= 128 and n < 9999}
            differ["row 40 alone"] = equal(mm.matmul(x[40:41], w, out_dtype=jnp.float32), want[40:41])
            return {"differing": sum(differ.values()), "where": {c: d for c, d in differ.items() if d}}
        report.guard(f"matmul {n}x{k}", products)

    def gated(activation):
        f, d = (136, 320) if report.small else (14336, 4096)
        x, g, u = random(0, (70, d), "bfloat16"), random(1, (f, d), "bfloat16", d ** -0.5), random(2, (f, d), "bfloat16", d ** -0.5)
        want = mm.gated_mlp(x, g, u, activation)
        return {"differing": sum(equal(mm.gated_mlp(x[:m], g, u, activation), want[:m]) for m in ((1,) if report.small else (1, 8, 64, 65)))}
    for activation in ("silu",) if report.small else ("silu", "gelu_tanh", "relu", "gelu"):
        report.guard(f"gated {activation}", lambda: gated(activation))

    def residual():
        n, k = (136, 320) if report.small else (4096, 14336)
        x, w, r = random(0, (70, k), "bfloat16"), random(1, (n, k), "bfloat16", k ** -0.5), random(2, (70, n), "bfloat16", 3)
        want = np.asarray(jax.jit(add)(r, mm.matmul(x, w)))
        return {"differing": sum(equal(mm.matmul(x[:m], w, residual=r[:m], split=split), want[:m])
                                 for m in ((70,) if report.small else (1, 8, 64, 65, 70)) for split in (False, True))}
    report.guard("residual", residual)

    def encoder(width, group, window):
        lengths = [150, 3] if report.small else [1000, 3, 129]
        q, k, v, starts = packed(lengths, 2, group, width)
        call = lambda *a: ma.attend_bidirectional(*a, scale=width ** -0.5, window=window)
        n, alone = lengths[0], packed(lengths[:1], 2, group, width)[3]
        want = call(q[:n], k[:n], v[:n], alone)
        poisoned = [jnp.concatenate([jnp.full_like(a[:5], np.nan), a[:n], jnp.full_like(a[:9], np.nan)]) for a in (q, k, v)]
        return {"differing": equal(call(q, k, v, starts)[:n], want) + equal(call(*poisoned, jnp.asarray([0, 5, n + 5, n + 14], jnp.int32))[5:n + 5], want)}
    for options in [(64, 1, None)] if report.small else [(64, 1, None), (64, 1, 64), (80, 4, None), (96, 1, 64), (128, 4, None), (256, 2, 64)]:
        report.guard(f"encoder attention {options}", lambda: encoder(*options))

    def grouped(sizes, n, k):
        x, gate, up, group_sizes = experts(sizes, n, k)
        cuts, differ = np.cumsum([0, *sizes]), {}
        alone = lambda f: jnp.concatenate([f(slice(cuts[e], cuts[e + 1]), e) for e, size in enumerate(sizes) if size])
        want = alone(lambda rows, e: mm.matmul(x[rows], gate[e]))
        for split in (False, True):
            differ[f"split {split}"] = equal(mg.grouped_matmul(x, gate, group_sizes, split=split)[:cuts[-1]], want)
        want = alone(lambda rows, e: mm.gated_mlp(x[rows], gate[e], up[e], "silu"))
        differ["gated"] = equal(mg.grouped_gated_mlp(x, gate, up, group_sizes, "silu")[:cuts[-1]], want)
        return {"differing": sum(differ.values()), "where": {c: d for c, d in differ.items() if d}}
    for options in [([1, 0, 9], 136, 320)] if report.small else [([1, 0, 2, 5], 4096, 2112), ([3, 64, 0, 300], 1000, 4096)]:
        report.guard(f"grouped {options}", lambda: grouped(*options))

    def row_kernels():
        x, weight = random(3, (9, 4301), "float32"), random(4, (4301,), "float32")
        return {"differing": sum(equal(f(x[4:5]), f(x)[4:5]) for f in (mr.row_sum, mr.log_sum_exp, lambda x: mr.rms_norm(x, weight, 1e-5)))}
    report.guard("rows", row_kernels)

    def attention(width, group, page, window, softcap):
        n = 150 if report.small else 2000
        q, k, v, tables = case([n, 40], 2, group, width, page, jnp.bfloat16, seed=1)
        options = dict(scale=width ** -0.5, window=window, softcap=softcap)
        call = lambda parts, decode=False, **more: ma.attention(*((s := step(q, tables, parts, decode))[0], k, v, s[1]), **options, **more)
        whole = call([(0, 0, n)])
        cut = n // 3
        differ = {"chunks": equal(jnp.concatenate([call([(0, 0, cut)]), call([(1, 0, 40), (0, cut, n)])[40:]]), whole)}
        for t in (0, 127, n - 1) if report.small else (0, 1, 127, 128, 129, 1000, n - 1):
            for run in (None, 1) if report.small else (None, 1, 2, 5):
                differ[f"decode {t} run {run}"] = equal(call([(0, t, t + 1)], True, run=run)[0], whole[t])
        return {"differing": sum(differ.values()), "where": {c: d for c, d in differ.items() if d}}
    for options in [(64, 3, 16, None, None)] if report.small else [(64, 7, 16, None, None), (128, 4, 64, None, None), (128, 8, 32, 300, None),
                                                                     (80, 1, 16, None, 20.0), (96, 4, 64, None, None), (256, 2, 64, 300, 20.0)]:
        report.guard(f"attention {options}", lambda: attention(*options))


def kernels(report):
    """Each kernel's time, its bytes and flops per second, and what XLA or cuDNN need for the same on contiguous data."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels.ragged import Ragged
    xla = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)
    shapes = [(1, 136, 320)] if report.small else [(m, n, k) for n, k in ((4096, 4096), (4096, 14336), (1024, 4096), (14336, 4096))
                                                  for m in (1, 8, 64, 256, 2048)]
    for m, n, k in shapes:
        def products(m=m, n=n, k=k):
            count = 1 if report.small else max(4, (400 << 20) // (2 * n * k))  # more weights than L2 holds
            x, ws = random(m, (m, k), "bfloat16"), [random(i, (n, k), "bfloat16", k ** -0.5) for i in range(count)]
            out = {}
            for name, f in (("mosaic", mm.matmul), ("mosaic_in_turn", lambda x, w: mm.matmul(x, w, split=False)), ("xla", xla)):
                s = seconds_of(jax.jit(lambda x, ws, f=f: [f(x, w) for w in ws]), x, ws) / count
                out[name] = {"us": s * 1e6, "bytes_per_s": 2 * (n * k + m * k + m * n) / s, "flop_per_s": 2 * m * n * k / s}
            return out
        report.guard(f"matmul {m}x{n}x{k}", products)
    for m in (1,) if report.small else (1, 64, 2048):
        def gated(m=m):
            f, d, count = (136, 320, 1) if report.small else (14336, 4096, 4)
            x, ws = random(0, (m, d), "bfloat16"), [random(i, (f, d), "bfloat16", d ** -0.5) for i in range(2 * count)]
            pairs = list(zip(ws[::2], ws[1::2]))
            s = seconds_of(jax.jit(lambda x, pairs: [mm.gated_mlp(x, g, u, "silu") for g, u in pairs]), x, pairs) / count
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
            s = seconds_of(jax.jit(lambda q, k, v, r, run=run: ma.attention(q, k, v, r, scale=width ** -0.5, run=run)), q, kv, kv + 1, ragged)
            out[f"run {run}"] = {"us": s * 1e6, "bytes_per_s": moved / s}
        if not report.small:
            flat = kv.reshape(rows, context, kv_heads, width)
            f = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))
            s = seconds_of(f, q[:, None], flat, flat + 1)
            out["cudnn contiguous"] = {"us": s * 1e6, "bytes_per_s": moved / s}
        return out
    for options in [(2, 40, 16, 1, 2, 64)] if report.small else [(64, 4096, 64, 8, 4, 128), (1, 4096, 64, 8, 4, 128), (8, 32768, 64, 8, 4, 128), (64, 4096, 16, 8, 4, 128)]:
        report.guard(f"decode {options}", lambda: decode(*options))

    def prefill(tokens, kv_heads, group, width):
        from pallas_kernels.ragged import contiguous
        ragged, pages = contiguous(1, tokens, 64)
        q, kv = random(0, (tokens, kv_heads * group, width), "bfloat16"), random(1, (pages, 64, kv_heads, width), "bfloat16")
        s = seconds_of(jax.jit(lambda q, k, v: ma.attention(q, k, v, ragged, scale=width ** -0.5)), q, kv, kv + 1)
        flops, out = 2 * tokens * tokens * kv_heads * group * width, {}
        out["mosaic"] = {"us": s * 1e6, "flop_per_s": flops / s}
        if not report.small:
            flat = kv.reshape(1, -1, kv_heads, width)[:, :tokens]
            f = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"))
            s = seconds_of(f, q[None], flat, flat + 1)
            out["cudnn contiguous"] = {"us": s * 1e6, "flop_per_s": flops / s}
        return out
    for tokens in (70,) if report.small else (2048, 8192):
        report.guard(f"prefill {tokens}", lambda: prefill(tokens, *((1, 2, 64) if report.small else (8, 4, 128))))


def model(report):
    """The 8B shape with random weights: step times against weights plus live KV over copy bandwidth, and bits end to end."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm.config import LayerSpec, ModelConfig, RopeSpec
    from jaxllm.models import decoder
    from pallas_kernels import dispatch
    from pallas_kernels.ragged import Ragged
    width, mlp, heads, kv_heads, head, depth, vocab = (64, 128, 2, 1, 64, 1, 256) if report.small else (4096, 14336, 32, 8, 128, 32, 128256)
    page, context, most = (16, 20, 2) if report.small else (64, 1024, 256)
    spec = LayerSpec(RopeSpec(tuple(500000.0 ** (-2 * i / head) for i in range(head // 2))))
    cfg = ModelConfig("LlamaForCausalLM", vocab, width, mlp, heads, kv_heads, head, 1e-5, 8192, (spec,) * depth)
    # Weights made one by one on the device; norms are one.
    leaves, tree = jax.tree.flatten(decoder.template(cfg, jnp.bfloat16))
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5, static_argnums=1)
    params = jax.tree.unflatten(tree, [jnp.ones(a.shape, a.dtype) if len(a.shape) == 1 else make(jax.random.key(i), a.shape) for i, a in enumerate(leaves)])
    weights = sum(a.nbytes for a in jax.tree.leaves(params)) - params.embedding.nbytes
    pages = -(-(context + 1) // page)
    kernel_sets = {"mosaic": dispatch._mosaic()} | ({} if report.small else {"reference": dispatch.SERVING})

    def stepper(kernels):
        def one(params, cache, tokens, ragged, rows):
            hidden, cache = decoder.forward(cfg, params, cache, tokens, ragged, kernels=kernels)
            logits = decoder.unembed(cfg, params, hidden if rows is None else hidden[rows], kernels=kernels)
            return logits, jnp.argmax(logits, -1), cache
        return jax.jit(one, donate_argnums=1)

    def decode_step(rows):
        at = jnp.full(rows, context, jnp.int32)
        table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
        return jnp.arange(rows, dtype=jnp.int32) % vocab, Ragged(at, table[:, context // page] * page + context % page, at + 1, table, None)

    def timed(step, cache, tokens, ragged, rows, repeats=8):
        start = time.perf_counter()
        logits, _, cache = step(params, cache, tokens, ragged, rows)
        logits.block_until_ready()
        compile_s, times = time.perf_counter() - start, []
        for _ in range(repeats):
            start = time.perf_counter()
            logits, _, cache = step(params, cache, tokens, ragged, rows)
            logits.block_until_ready()
            times.append(time.perf_counter() - start)
        return {"ms": float(np.median(times)) * 1e3, "first_s": compile_s}, np.asarray(logits), cache

    kept = {}
    for name, kernels in kernel_sets.items():
        step = stepper(kernels)
        cache = decoder.empty_cache(cfg, most * pages, page, jnp.bfloat16)
        for rows in (1, most) if report.small else (1, 8, 64, 256) if name == "mosaic" else (1, 64):
            def decoding():
                nonlocal cache
                out, kept[name, rows], cache = timed(step, cache, *decode_step(rows), None)
                live = 4 * rows * context * kv_heads * head * depth
                return out | {"bytes_to_read": weights + live, "bytes_per_s": (weights + live) / out["ms"] * 1e3, "tokens_per_s": rows / out["ms"] * 1e3}
            report.guard(f"{name} decode {rows} rows, context {context}", decoding)
        if (name, 1) in kept:
            worst = {str(r): equal(kept[name, r][:1], kept[name, 1]) for (n, r) in kept if n == name and r > 1}
            report.add(f"{name} logits of row 0 alone and in a crowd", differing=sum(worst.values()), where=worst)
        tokens = 24 if report.small else 2048
        at = jnp.arange(tokens, dtype=jnp.int32)
        ragged = Ragged(at, at, jnp.asarray([tokens], jnp.int32), jnp.arange(-(-tokens // page), dtype=jnp.int32)[None], jnp.asarray([0, tokens], jnp.int32))

        def prefilling():
            nonlocal cache
            out, kept[name, "prefill"], cache = timed(step, cache, at % vocab, ragged, jnp.asarray([tokens - 1], jnp.int32), 4)
            return out | {"flop_per_s": weights * tokens / out["ms"] * 1e3, "tokens_per_s": tokens / out["ms"] * 1e3}
        report.guard(f"{name} prefill {tokens}", prefilling)

        def repeated():
            """The last token of that prompt again as a decode step, on the cache that the prefill wrote."""
            nonlocal cache
            last = jnp.asarray([tokens - 1], jnp.int32)
            logits, _, cache = step(params, cache, last % vocab, Ragged(last, last, last + 1, ragged.block_tables, None), None)
            return {"differing": equal(logits, kept[name, "prefill"])}
        report.guard(f"{name} last token as decode and as prefill", repeated)
        del cache, step


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small", action="store_true", help="tiny shapes in the simulator, to test this file on a CPU")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here instead of all in processes of their own")
    options = parser.parse_args()
    if options.section:
        report = Report(options.out, options.small)
        section = globals()[options.section]
        if options.small:
            from pallas_kernels import compat
            with compat.interpreting():
                section(report)
        else:
            section(report)
        return 0
    deadline, out = time.monotonic() + 60 * options.minutes - 5, Path(options.out)
    result = {"when": time.strftime("%Y-%m-%d %H:%M:%S"), "small": options.small, "times_mean_something": not options.small, "sections": {}}
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | ({"JAX_PLATFORMS": "cpu"} if options.small else {})
    for name, limit in SECTIONS.items():
        part = out.with_suffix(f".{name}.json")
        part.unlink(missing_ok=True)
        limit, start = min(limit * (4 if options.small else 1), deadline - time.monotonic()), time.monotonic()
        entry = {"status": "no time left"}
        if limit > 10:
            command = [sys.executable, __file__, "--section", name, "--out", str(part)] + ["--small"] * options.small
            try:
                done = subprocess.run(command, env=env, timeout=limit, capture_output=True, text=True)
                entry = {"status": "done" if done.returncode == 0 else f"exit {done.returncode}", "log": "" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]}
            except subprocess.TimeoutExpired as error:
                entry = {"status": f"stopped after {limit:.0f} s", "log": str(error.stdout or b"")[-2000:]}
        entry |= {"seconds": round(time.monotonic() - start, 1), "entries": json.loads(part.read_text()) if part.exists() else []}
        part.unlink(missing_ok=True)
        result["sections"][name] = entry
        out.write_text(json.dumps(result, indent=1))
        errors = [e["name"] for e in entry["entries"] if "error" in e]
        differing = [e["name"] for e in entry["entries"] if e.get("differing")]
        print(f"{name}: {entry['status']} in {entry['seconds']} s, {len(entry['entries'])} entries, errors {errors}, differing {differing}", flush=True)
    bad = [s for s, e in result["sections"].items() if e["status"] != "done" or any("error" in x or x.get("differing") for x in e["entries"])]
    print("at fault:", bad or "nothing")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
