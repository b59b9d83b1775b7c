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


def packed(lengths, kv_heads, group, width, dtype="bfloat16"):
    """q, k, v [T, ., H] of sequences that follow one another, with eight rows of NaN at the end, and their starts."""
    import jax.numpy as jnp
    import numpy as np
    t = sum(lengths)
    heads = kv_heads * group, kv_heads, kv_heads
    q, k, v = (random(i, (t + 8, n, width), "float32").at[t:].set(np.nan).astype(dtype) for i, n in enumerate(heads))
    return q, k, v, jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


def experts(sizes, n, k):
    """Rows by expert with five rows of NaN behind them, the experts' gate and up, and the sizes."""
    import jax.numpy as jnp
    import numpy as np
    x = random(0, (sum(sizes) + 5, k), "float32").at[sum(sizes):].set(np.nan).astype("bfloat16")
    gate, up = (random(i, (len(sizes), n, k), "bfloat16", k ** -0.5) for i in (1, 2))
    return x, gate, up, jnp.asarray(sizes, jnp.int32)


def oracle(report):
    """Every kernel against float64, on the ragged lengths that break things."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_grouped as mg
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

    def encoder(width, group, window, softcap):
        lengths = [1, 7, 40] if report.small else [1, 7, 8, 129, 0, 1000, 300]
        q, k, v, starts = packed(lengths, 2, group, width)
        call = partial(ma.attend_bidirectional, scale=width ** -0.5, window=window, softcap=softcap)
        got = exact(jax.jit(call)(q, k, v, starts))
        wide, worst, at = [exact(a) for a in (q, k, v)], 0.0, 0
        for n in filter(None, lengths):
            own_q, own_k, own_v = (a[at:at + n] for a in wide)
            score = np.einsum("qnh,knh->nqk", own_q, np.repeat(own_k, group, 1)) * width ** -0.5
            score = score if softcap is None else np.tanh(score / softcap) * softcap
            score = np.where(np.abs(np.arange(n)[:, None] - np.arange(n)) <= (n if window is None else window), score, -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            want = np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), np.repeat(own_v, group, 1))
            worst, at = max(worst, float(np.abs(got[at:at + n] - want).max())), at + n
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

    from jaxllm.engine.sampler import sortable
    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_grouped as mg
    from pallas_kernels import mosaic_matmul as mm
    from pallas_kernels import mosaic_rows as mr
    from pallas_kernels.mosaic_tail import tail_sums
    from pallas_kernels.rounding import add
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

    def residual():
        n, k = (136, 320) if report.small else (4096, 14336)
        x, w, r = random(0, (70, k), "bfloat16"), random(1, (n, k), "bfloat16", k ** -0.5), random(2, (70, n), "bfloat16", 3)
        want = np.asarray(jax.jit(add)(r, mm.matmul(x, w)))
        return {"differing": sum(equal(mm.matmul(x[:m], w, residual=r[:m], split=split), want[:m])
                                 for m in ((70,) if report.small else (1, 8, 64, 65, 70)) for split in (False, True))}
    report.guard("residual", residual)

    def several():
        n, k = ((136, 64, 40), 320) if report.small else ((4096, 1024, 1024), 4096)
        x = random(0, (70, k), "bfloat16")
        weights, biases = [random(1 + i, (w, k), "bfloat16", k ** -0.5) for i, w in enumerate(n)], [random(9, n[:1], "bfloat16"), None, None]
        want = jnp.concatenate([mm.matmul(x, w, b) for w, b in zip(weights, biases)], 1)
        call = jax.jit(mm.matmuls, static_argnames="split")
        return {"differing": sum(equal(jnp.concatenate(call(x[:m], weights, biases, split=split), 1), want[:m])
                                 for m in ((70,) if report.small else (1, 64, 70)) for split in (False, True))}
    report.guard("several products", several)

    def normed():
        n, k = (136, 320) if report.small else (4096, 14336)
        x, w, r, norm = (random(i, shape, "bfloat16", scale) for i, (shape, scale) in enumerate(
            [((70, k), 1), ((n, k), k ** -0.5), ((70, n), 3), ((n,), 1)]))
        total = mm.matmul(x, w, residual=r)
        want = jnp.concatenate([total, mr.rms_norm(total, norm, 1e-5)], 1)
        call = jax.jit(partial(mm.matmul_norm, eps=1e-5), static_argnames="split")
        return {"differing": sum(equal(jnp.concatenate(call(x[:m], w, None, residual=r[:m], norm=norm, split=split), 1), want[:m])
                                 for m in ((70,) if report.small else (1, 64, 70)) for split in (False, True))}
    report.guard("product, residual and norm", normed)

    def row_kernels():
        x, weight = random(3, (9, 4301), "float32"), random(4, (4301,), "float32")
        return {"differing": sum(equal(f(x[4:5]), f(x)[4:5]) for f in (mr.log_sum_exp, lambda x: mr.rms_norm(x, weight, 1e-5)))}
    report.guard("rows", row_kernels)

    def tails():
        rows, vocab = (3, 4301) if report.small else (64, 128256)
        order, weight = sortable(random(5, (rows, vocab), "float32")), jnp.exp(random(6, (rows, vocab), "float32"))
        at_least = sortable(random(7, (rows, 15), "float32"))
        differ = 0
        for weights in (weight, None):
            own = lambda s: None if weights is None else weights[s]
            many = tail_sums(order, weights, at_least)
            differ += equal(tail_sums(order[2:3], own(slice(2, 3)), at_least[2:3]), many[2:3])
            differ += equal(tail_sums(order, weights, at_least[:, 9:10]), many[:, 9:10])
        exact = (np.asarray(order)[:, None] >= np.asarray(at_least)[..., None]).sum(-1)
        return {"differing": differ + int((exact != np.asarray(many)).sum())}
    report.guard("tails", tails)

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

    def encoder(width, group, window):
        lengths = [150, 3] if report.small else [1000, 3, 129]
        q, k, v, starts = packed(lengths, 2, group, width)
        call = jax.jit(partial(ma.attend_bidirectional, scale=width ** -0.5, window=window))
        n, alone = lengths[0], packed(lengths[:1], 2, group, width)[3]
        want = call(q[:n], k[:n], v[:n], alone)
        poisoned = [jnp.concatenate([jnp.full_like(a[:5], np.nan), a[:n], jnp.full_like(a[:9], np.nan)]) for a in (q, k, v)]
        among_nan = call(*poisoned, jnp.asarray([0, 5, n + 5, n + 14], jnp.int32))
        return {"differing": equal(call(q, k, v, starts)[:n], want) + equal(among_nan[5:n + 5], want)}
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
