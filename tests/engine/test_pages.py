"""The page pool: states, prefix matching, reuse order, and a random walk with the books checked after each move."""
import random

import pytest

from jaxllm.engine.pages import ROOT, PagePool, chain_hash


def remember_all(pool, pages, tokens, salt=""):
    parent = ROOT
    for i, page in enumerate(pages):
        parent = pool.remember(page, parent, tuple(tokens[i * pool.page_size:(i + 1) * pool.page_size]), salt)


def test_a_released_prefix_is_found_again():
    pool = PagePool(4, 2)
    pages = pool.allocate(2)
    remember_all(pool, pages, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.match([1, 2, 3, 4, 5]) == pages
    assert pool.match([1, 2, 9, 9]) == pages[:1]
    assert pool.match([1]) == []
    assert pool.available == 4


def test_a_page_is_found_only_behind_its_own_prefix():
    pool = PagePool(4, 2)
    pages = pool.allocate(2)
    remember_all(pool, pages, [1, 2, 3, 4])
    assert pool.match([3, 4]) == []


def test_a_salt_keeps_prefixes_apart():
    pool = PagePool(4, 2)
    remember_all(pool, pool.allocate(1), [1, 2], salt="tenant")
    assert pool.match([1, 2]) == [] and len(pool.match([1, 2], "tenant")) == 1


def test_a_colliding_hash_does_not_serve_another_text(monkeypatch):
    monkeypatch.setattr("jaxllm.engine.pages.chain_hash", lambda parent, tokens, salt="": b"same")
    pool = PagePool(4, 2)
    remember_all(pool, pool.allocate(1), [1, 2])
    assert pool.match([7, 8]) == []


def test_the_tail_of_a_prefix_is_reused_before_its_head_and_free_pages_before_both():
    pool = PagePool(3, 1)
    pages = pool.allocate(2)
    remember_all(pool, pages, [5, 6])
    pool.release(pages)
    assert pool.allocate(1) == [2]
    assert pool.allocate(1) == [pages[1]]
    assert pool.match([5, 6]) == pages[:1]


def test_an_allocation_that_cannot_be_met_changes_nothing():
    pool = PagePool(2, 4)
    held = pool.allocate(1)
    assert pool.allocate(2) is None
    pool.check([held])
    assert pool.available == 1


def test_a_broken_book_is_reported():
    pool = PagePool(2, 4)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="do not balance"):
        pool.check([])


def test_the_hash_depends_on_every_token_and_on_what_came_before():
    hashes = {chain_hash(parent, tokens, salt) for parent in (ROOT, b"x") for tokens in ((1, 2), (2, 1), (1, 2 + 256)) for salt in ("", "s")}
    assert len(hashes) == 12


@pytest.mark.parametrize("seed", range(8))
def test_random_walk(seed):
    rng = random.Random(seed)
    pool = PagePool(rng.choice([3, 8, 20]), 2)
    holders = []  # (pages, tokens)
    for _ in range(400):
        move = rng.random()
        if move < 0.5:
            tokens = [rng.randrange(3) for _ in range(2 * rng.randrange(1, 5))]
            known = pool.match(tokens)
            pool.hold(known)
            fresh = pool.allocate(len(tokens) // 2 - len(known))
            if fresh is None:
                pool.release(known)
            else:
                pages = known + fresh
                remember_all(pool, pages, tokens)
                holders.append(pages)
        elif move < 0.9 and holders:
            pool.release(holders.pop(rng.randrange(len(holders))))
        elif move < 0.95 and holders:
            pool.forget(rng.choice(holders)[-1:])
        elif move < 0.97:
            pool.forget_all()
        try:
            pool.check(holders)
        except RuntimeError as e:
            raise AssertionError(f"seed {seed}") from e
    for pages in holders:
        pool.release(pages)
    pool.check([])
    assert pool.available == pool.num_pages
