"""Pages of the KV cache: who holds which, which hold a known prefix, and which may be reused next. No jax here.

A page is in exactly one of three states:
    held    by one or more sequences (its count says how many)
    cached  held by nobody, its contents are known by their hash and may be held again; reused oldest first
    free    held by nobody, its contents are worthless
"""
import dataclasses
import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq

ROOT = b""  # the hash before the first page


def chain_hash(parent: bytes, tokens: Seq[int], salt: str = "") -> bytes:
    """The hash of a page's contents and of all pages before it (16 bytes)."""
    body = b"".join(t.to_bytes(8, "little") for t in tokens)
    return hashlib.blake2b(parent + salt.encode() + b"\0" + body, digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class Known:
    """What a page is known to hold."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


class PagePool:
    """`num_pages` pages of `page_size` tokens. Raises RuntimeError from `check` when its books do not balance."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.counts = [0] * num_pages
        self.known: list[Known | None] = [None] * num_pages
        self.by_digest: dict[bytes, int] = {}
        self.free: deque[int] = deque(range(num_pages))
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Pages that an allocation could get."""
        return len(self.free) + len(self.cached)

    def match(self, tokens: Seq[int], salt: str = "") -> list[int]:
        """The pages that hold the longest known prefix of `tokens`, full pages only; nothing is held yet.

        Hash and tokens are both compared, so that a collision cannot serve another text's keys.
        """
        pages, parent = [], ROOT
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            part = tuple(tokens[start:start + self.page_size])
            digest = chain_hash(parent, part, salt)
            page = self.by_digest.get(digest)
            if page is None or self.known[page] != Known(digest, parent, part):
                break
            pages.append(page)
            parent = digest
        return pages

    def hold(self, pages: Seq[int]) -> None:
        """Each page gets one more holder."""
        for page in pages:
            if self.counts[page] == 0:
                del self.cached[page]
            self.counts[page] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one holder and worthless contents, or None (and nothing changed) if there are too few."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self.free:
                page = self.free.popleft()
            else:
                page, _ = self.cached.popitem(last=False)
                self._forget(page)
            self.counts[page] = 1
            pages.append(page)
        return pages

    def remember(self, page: int, parent: bytes, tokens: tuple[int, ...], salt: str = "") -> bytes:
        """The hash under which a held, full page is from now on found; the first page with given contents keeps the entry."""
        digest = chain_hash(parent, tokens, salt)
        if digest not in self.by_digest and self.known[page] is None:
            self.by_digest[digest] = page
            self.known[page] = Known(digest, parent, tokens)
        return digest

    def release(self, pages: Seq[int]) -> None:
        """Each page loses one holder. Later pages of a sequence become the older ones, since a prefix outlives its tail."""
        for page in reversed(pages):
            self.counts[page] -= 1
            if self.counts[page] == 0:
                if self.known[page] is None:
                    self.free.append(page)
                else:
                    self.cached[page] = None

    def forget(self, pages: Seq[int]) -> None:
        """The contents of held pages are not to be found again."""
        for page in pages:
            self._forget(page)

    def forget_all(self) -> None:
        """No prefix is known any more; held pages stay held."""
        for page in range(self.num_pages):
            self._forget(page)
        self.free.extend(self.cached)
        self.cached.clear()

    def _forget(self, page: int) -> None:
        known = self.known[page]
        if known is not None:
            del self.by_digest[known.digest]
            self.known[page] = None

    def check(self, holders: Seq[Seq[int]]) -> None:
        """Raises RuntimeError unless every page is in exactly one state and `holders` (the pages of each sequence) agree."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        free, cached = set(self.free), set(self.cached)
        held = {p for p in range(self.num_pages) if counts[p]}
        problems = []
        if counts != self.counts:
            problems.append(f"counts differ at {[p for p in range(self.num_pages) if counts[p] != self.counts[p]][:8]}")
        if len(free) != len(self.free) or free & cached or free & held or cached & held:
            problems.append("a page is in two states")
        if len(free) + len(cached) + len(held) != self.num_pages:
            problems.append(f"{len(free)} free + {len(cached)} cached + {len(held)} held != {self.num_pages}")
        if any(self.known[p] for p in free) or any(self.known[p] is None for p in cached):
            problems.append("a free page is known or a cached one is not")
        if {k.digest: p for p, k in enumerate(self.known) if k} != self.by_digest:
            problems.append("the index of prefixes does not match the pages")
        if problems:
            raise RuntimeError("the page pool's books do not balance: " + "; ".join(problems))
