"""The probe against libraries that are worse than any seen: whatever a sum's order depends on, a row keeps its bits or it is said."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import forms, probe
from pallas_kernels.forms import FORMS, Forms, Law, possible

SHAPES = probe.Shapes(((96, 160), (160, 96), (96, 200)), heads=4, kv_heads=2, head_dim=16)
COUNTS = (1, 2, 3, 5, 8, 16, 17, 31, 64, 65, 200)


def in_halves(product):
    """The same product summed in another order: K in two halves."""
    def halves(a, b, **options):
        half = a.shape[-1] // 2
        last = options.get("last", True)
        parts = [product(a[..., s], b[..., s] if last else b[..., s, :], **options) for s in (slice(None, half), slice(half, None))]
        return parts[0] + parts[1]
    return halves


def tall(a, b):
    """Whether the weights are the left operand."""
    return a.shape[-2] > b.shape[-2]


# name -> which products (a [M, K], b [N, K]) the library sums in another order
LIBRARIES = {
    "by the number of rows": lambda a, b: min(a.shape[-2], b.shape[-2]) % 3 == 2,
    "of few rows": lambda a, b: min(a.shape[-2], b.shape[-2]) <= 4,
    "by the layout": tall,
    "by N mod 16": lambda a, b: b.shape[-2] % 16 == 8,
    "by the size": lambda a, b: a.shape[-2] * b.shape[-2] > 8000,
}


def put(monkeypatch, library, name):
    """`library` in place of forms.<name>, for everything that is traced from now on."""
    monkeypatch.setattr(forms, name, library)
    jax.clear_caches()


@pytest.fixture
def adversary(monkeypatch):
    """Puts a library under the seam by its name; afterwards nothing of it is left in jax's caches."""
    def choose(name):
        true = forms.library
        if name == "by the place in the tile":
            put(monkeypatch, lambda a, b: jnp.where((jnp.arange(a.shape[0]) % 4 == 3)[:, None], in_halves(true)(a, b), true(a, b)), "library")
        else:
            put(monkeypatch, lambda a, b: in_halves(true)(a, b) if LIBRARIES[name](a, b) else true(a, b), "library")
    yield choose
    monkeypatch.undo()
    jax.clear_caches()


def bits(a):
    return np.asarray(a).tobytes()


def rows_agree(found: Forms, dtype) -> list:
    """The (K, N, number of rows) at which a row has other bits than among 200."""
    wrong = []
    for k, n in SHAPES.products:
        keys = jax.random.split(jax.random.key(k), 2)
        x, w = jax.random.normal(keys[0], (200, k)).astype(dtype), jax.random.normal(keys[1], (n, k)).astype(dtype)
        product = jax.jit(found.product, compiler_options=found.compiler_options or None)
        want = np.asarray(product(x, w))
        wrong += [(k, n, rows) for rows in COUNTS if bits(product(x[:rows], w)) != bits(want[:rows])]
    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("portable", [False, True])
def test_what_the_probe_finds_here_holds_for_every_number_of_rows(dtype, portable):
    if portable and dtype == "bfloat16":
        pytest.skip("the portable order is of float32 and float16")
    found = probe.find(SHAPES, dtype, portable=portable)
    print(f"{dtype}: {found.law}, attention {found.attention_rows} {found.values_last}, {found.products}")
    assert found.proven
    assert rows_agree(found, dtype) == []


@pytest.mark.parametrize("library", [*LIBRARIES, "by the place in the tile"])
def test_no_library_slips_through(adversary, library):
    adversary(library)
    found = probe.find(SHAPES, "float32")
    assert rows_agree(found, "float32") == [], f"{found}"


def test_a_library_that_depends_on_the_rows_leaves_none_of_its_forms(adversary):
    adversary("by the number of rows")
    found = probe.find(SHAPES, "float32")
    used = {name for _, table in found.products for _, name in table}
    assert found.proven and "plain" not in used


def test_attention_takes_more_rows_where_few_have_another_order(monkeypatch):
    true = forms.library_batched
    few = lambda a, b, *, last: (in_halves(true) if a.shape[2] < 8 else true)(a, b, last=last)
    put(monkeypatch, few, "library_batched")
    try:
        assert probe.find(SHAPES, "float32").attention_rows == 8
        put(monkeypatch, lambda a, b, *, last: (true if last else in_halves(true))(a, b, last=last), "library_batched")
        found = probe.find(SHAPES, "float32")
        assert found.values_last or found.law.chunk is None  # another order of values is one order too, if all have it
    finally:
        monkeypatch.undo()
        jax.clear_caches()


@pytest.mark.parametrize("chunk", [512, 1024])
@pytest.mark.parametrize("k, n", [(64, 128), (577, 66), (2100, 64)])
def test_the_law_as_xla_writes_it_is_a_chain_of_fused_multiply_adds_by_chunks(k, n, chunk):
    """The one test that knows an order: ours, which no library decides."""
    rng = np.random.default_rng(k)
    x, w = rng.standard_normal((3, k), np.float32), rng.standard_normal((n, k), np.float32)
    total = None
    for start in range(0, k, chunk):
        chain = np.zeros((3, n), np.float32)
        for i in range(start, min(start + chunk, k)):
            chain = fused(x[:, i:i + 1], w[:, i], chain)
        total = chain if total is None else total + chain
    law = Law(chunk, False)
    assert bits(jax.jit(partial(FORMS["written"], law=law))(x, w)) == bits(total)
    if possible("stream", k, n, 1, law, jnp.float32):
        assert bits(jax.jit(partial(FORMS["stream"], law=law))(x[:1], w)) == bits(total[:1])


def fused(a, b, c):
    """a * b + c of float32, rounded once. In float64 the product is exact; the sum is rounded to odd, so that the second rounding
    decides as one would."""
    product = a.astype(np.float64) * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = total.view(np.int64) & 1 == 0
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & even, (total.view(np.int64) + toward).view(np.float64), total).astype(np.float32)


def test_forms_are_differentiable_whatever_they_are():
    x, w = jnp.ones((1, 96)), jnp.linspace(-1, 1, 96 * 160).reshape(160, 96)
    for name in FORMS:
        table = tuple((shape, ((1 << 30, name),)) for shape in SHAPES.products)
        loss = lambda x, w: Forms(Law(512, False), table).product(x, w).sum()
        dx, dw = jax.grad(loss, (0, 1))(x, w)
        np.testing.assert_allclose(dx[0], w.sum(0), rtol=1e-4, atol=1e-4)  # sums of 160 in another order
        np.testing.assert_allclose(dw, jnp.ones_like(w), rtol=1e-6)


def test_safer_forms_end():
    found = Forms(Law(512, True), tuple((shape, ((512, "plain"),)) for shape in SHAPES.products))
    cut = found.safer(4)
    assert {cut.form(k, n, 4) for k, n in SHAPES.products} == {"cut"}
    assert {cut.safer(4).form(k, n, 4) for k, n in SHAPES.products} == {"written"} and cut.safer(4).safer(4) is None
    assert Forms(Law(None, False), found.products).safer(4) is None
