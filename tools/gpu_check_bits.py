"""The sections of gpu_check.py that ask whether a card is right: every kernel against float64, and one row's bits everywhere."""
from functools import partial


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


def oracle(report):
    """Every kernel against float64, on the ragged lengths that break things."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels import mosaic_rows as mr
    attend = jax.jit(ma.attention, static_argnames=("scale", "window", "softcap"))  # one program instead of thirty small ones
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
        got = exact(attend(queries, k, v, ragged, scale=width ** -0.5, window=window, softcap=softcap))
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


def bits(report):
    """One row's bits in every number of rows, schedule and kind of step: `differing` must be 0 everywhere."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels import mosaic_rows as mr
    product = jax.jit(partial(mm.matmul, out_dtype=jnp.float32), static_argnames="split")
    attend = jax.jit(ma.attention, static_argnames=("scale", "window", "softcap", "run"))
    shapes = [(136, 320)] if report.small else [(4096, 4096), (4096, 14336), (896, 896), (576, 1536), (128256, 4096)]
    counts, halves = ((1, 66), (1,)) if report.small else ((1, 2, 7, 8, 33, 64, 65, 128, 129, 511), (1, 64, 128))
    for n, k in shapes:
        def products(n=n, k=k):
            x, w = random(n, (512 if not report.small else 70, k), "bfloat16"), random(k, (n, k), "bfloat16", k ** -0.5)
            want = product(x, w)
            differ = {str(m): equal(product(x[:m], w), want[:m]) for m in counts}
            differ |= {f"split {split} {m}": equal(product(x[:m], w, split=split), want[:m]) for m in halves for split in (False, True) if n < 9999}
            differ["row 40 alone"] = equal(product(x[40:41], w), want[40:41])
            return {"differing": sum(differ.values()), "where": {c: d for c, d in differ.items() if d}}
        report.guard(f"matmul {n}x{k}", products)

    def gated(activation):
        f, d = (136, 320) if report.small else (14336, 4096)
        x, g, u = random(0, (70, d), "bfloat16"), random(1, (f, d), "bfloat16", d ** -0.5), random(2, (f, d), "bfloat16", d ** -0.5)
        want = mm.gated_mlp(x, g, u, activation)
        return {"differing": sum(equal(mm.gated_mlp(x[:m], g, u, activation), want[:m]) for m in ((1,) if report.small else (1, 8, 64, 65)))}
    for activation in ("silu",) if report.small else ("silu", "gelu_tanh", "relu", "gelu"):
        report.guard(f"gated {activation}", lambda: gated(activation))

    def row_kernels():
        x, weight = random(3, (9, 4301), "float32"), random(4, (4301,), "float32")
        return {"differing": sum(equal(f(x[4:5]), f(x)[4:5]) for f in (mr.row_sum, mr.log_sum_exp, lambda x: mr.rms_norm(x, weight, 1e-5)))}
    report.guard("rows", row_kernels)

    def attention(width, group, page, window, softcap):
        n = 150 if report.small else 2000
        q, k, v, tables = case([n, 40], 2, group, width, page, jnp.bfloat16, seed=1)
        options = dict(scale=width ** -0.5, window=window, softcap=softcap)
        call = lambda parts, decode=False, **more: attend(*((s := step(q, tables, parts, decode))[0], k, v, s[1]), **options, **more)
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


