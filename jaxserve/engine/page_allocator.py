"""Hands out KV pages: a free list, reference counts, and the prefix cache. No JAX.

A full page is known by the hash of its tokens chained to the hash of the page before, so equal
hashes mean equal prefixes. A freed page keeps its content and its hash until it is handed out
again, least recently freed first: eviction needs no code of its own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

PADDING_PAGE = 0
"""Padding tokens write here; no request owns it."""


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full page, chained to its parent's (for the first page, the request's salt).

    Cryptographic, so that nobody can craft a prompt that hits another's pages.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PageAllocator:
    """Pages 1 to ``num_pages - 1`` of a pool; page 0 is the padding's."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self._page_of_hash: dict[bytes, int] = {}
        self._hash_of_page: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now, cached ones included."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that a request could own if it were alone."""
        return self.num_pages - 1

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages, least recently freed first; their cached content is forgotten.

        Raises:
            MemoryError: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
            old = self._hash_of_page.pop(page, None)
            if old is not None:
                del self._page_of_hash[old]
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives a request's pages back; the last pages of a sequence are reused first."""
        for page in reversed(pages):
            if self._ref_counts[page] <= 0:
                raise RuntimeError(f"page {page} was freed twice")
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                self._free[page] = None

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached pages of the longest known prefix of ``hashes``. Takes no reference."""
        pages = []
        for hash_ in hashes:
            page = self._page_of_hash.get(hash_)
            if page is None:
                break
            pages.append(page)
        return pages

    def find(self, hash_: bytes) -> int:
        """The cached page of a hash; PADDING_PAGE if there is none. Takes no reference."""
        return self._page_of_hash.get(hash_, PADDING_PAGE)

    def num_free_after_taking(self, pages: Iterable[int]) -> int:
        """Free pages left if ``take(pages)`` were called."""
        return len(self._free) - sum(page in self._free for page in pages)

    def take(self, pages: Sequence[int]) -> None:
        """Adds a reference to matched pages."""
        for page in pages:
            self._ref_counts[page] += 1
            self._free.pop(page, None)

    def register(self, page: int, hash_: bytes) -> None:
        """Makes a full page findable. Call it once the step that wrote the page has completed.

        Of two pages with equal content, the first stays the one that is found.
        """
        if self.enable_prefix_caching and hash_ not in self._page_of_hash:
            self._page_of_hash[hash_] = page
            self._hash_of_page[page] = hash_

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Makes pages unfindable, because what was written to them can't be trusted."""
        for hash_ in hashes:
            page = self._page_of_hash.pop(hash_, None)
            if page is not None:
                del self._hash_of_page[page]

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes, for example after new weights were loaded.

        Raises:
            RuntimeError: pages are in use; their requests would make old content findable again.
        """
        if self.num_free < self.num_usable:
            raise RuntimeError("the prefix cache can be reset only while no request runs")
        self._page_of_hash.clear()
        self._hash_of_page.clear()

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Checks every invariant against the pages of all live requests.

        Raises:
            RuntimeError: a page is lost, owned twice, or miscounted.
        """
        owners = Counter(page for table in tables for page in table)
        problems = []
        if PADDING_PAGE in owners or PADDING_PAGE in self._free:
            problems.append("the padding page is in use")
        for page in range(1, self.num_pages):
            if self._ref_counts[page] != owners[page]:
                problems.append(
                    f"page {page}: {self._ref_counts[page]} refs, {owners[page]} owners"
                )
            if (owners[page] == 0) != (page in self._free):
                problems.append(f"page {page}: {owners[page]} owners, free: {page in self._free}")
        if any(self._page_of_hash.get(h) != p for p, h in self._hash_of_page.items()):
            problems.append("the two hash tables disagree")
        if len(self._page_of_hash) != len(self._hash_of_page):
            problems.append("the two hash tables differ in size")
        if problems:
            raise RuntimeError("page allocator: " + "; ".join(problems[:5]))
