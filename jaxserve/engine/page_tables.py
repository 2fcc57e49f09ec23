"""The pages of requests: one page table per group of layers, all out of one pool. No JAX.

Layers that see everything share a table, and so do layers with one sliding window. A column of a
request is as many pages, one per table, as there are tables: the keys and values of ``page_size``
tokens. In a windowed table, pages whose tokens no later query can see are given back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxserve.engine.decision import Decision
from jaxserve.engine.page_allocator import PADDING_PAGE, PageAllocator, page_hash
from jaxserve.engine.request import Request

Cells = list[tuple[int, int, int]]
"""Entries of the page tables, which lie one below the other: row, column, page."""
Columns = list[list[int]]
"""Per table, the pages of a request's columns; PADDING_PAGE where nobody sees them any more."""


class PageTables:
    """Gives requests their pages and takes them back.

    Args:
        allocator: the pool.
        windows: per table, how many tokens a query of its layers sees, itself included; None for
            all.
        num_rows: rows of each table.
        num_tokens_ahead: most tokens of a request whose steps are under way at a time.
        long_rope_len: see Scheduler.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        windows: Sequence[int | None],
        num_rows: int,
        num_tokens_ahead: int,
        long_rope_len: int | None = None,
    ) -> None:
        self.allocator = allocator
        self.windows = tuple(windows)
        self._num_rows = num_rows
        self._num_tokens_ahead = num_tokens_ahead
        self._long_rope_len = long_rope_len
        self._windowed = [(t, w) for t, w in enumerate(self.windows) if w is not None]

    @property
    def has_windows(self) -> bool:
        """Whether pages are given back while a request runs."""
        return bool(self._windowed)

    @property
    def num_tables(self) -> int:
        """Pages in a column."""
        return len(self.windows)

    def num_columns(self, request: Request) -> int:
        """Columns that a request has."""
        return len(request.pages[0]) if request.pages else 0

    def most_pages(self, num_tokens: int) -> int:
        """Most pages that a request of so many tokens holds at a time."""
        size = self.allocator.page_size
        return most_pages(self.windows, num_tokens, size, self._num_tokens_ahead)

    def promised(self, requests: Sequence[Request], num_computed_tokens: np.ndarray) -> int:
        """Pages that running requests don't hold yet, but will when their prompts are computed.

        Without windows that is none: then a request gets all columns of its prompt at once.
        """
        if not self._windowed:
            return 0
        return sum(
            max(self.most_pages(len(request.token_ids)) - held(request.pages), 0)
            for request, done in zip(requests, num_computed_tokens.tolist())
            if done < len(request.token_ids)
        )

    # --- giving ------------------------------------------------------------------------------

    def hits(self, request: Request) -> Columns:
        """Columns of a waiting request that are cached; its last token is always left to compute.

        In a windowed table only those that the next query sees must be there.
        """
        none: Columns = [[] for _ in self.windows]
        if not self.allocator.enable_prefix_caching or request.reads_whole_prompt:
            return none
        count = (len(request.token_ids) - 1) // self.allocator.page_size
        self.hash_columns(request, count)
        hashes = request.page_hashes[:count]
        found = none
        for table, window in enumerate(self.windows):
            if window is None:
                found[table] = self.allocator.match(_key(h, table) for h in hashes[:count])
                count = len(found[table])
        for table, _ in self._windowed:
            found[table] = [self.allocator.find(_key(h, table)) for h in hashes[:count]]
        count = self._longest(found, count)
        for table, window in enumerate(self.windows):
            first = self._first_seen(window, count * self.allocator.page_size)
            found[table] = [PADDING_PAGE] * first + found[table][first:count]
        return found

    def _longest(self, found: Columns, count: int) -> int:
        """The most columns, up to ``count``, after which a query finds all that it sees."""
        size, runs = self.allocator.page_size, []
        for table, window in self._windowed:
            # By number of columns, how many of the last ones are there without a gap.
            unbroken = [0]
            for page in found[table]:
                unbroken.append(0 if page == PADDING_PAGE else unbroken[-1] + 1)
            runs.append((unbroken, window))
        while any(
            unbroken[count] < count - self._first_seen(window, count * size)
            for unbroken, window in runs
        ):
            count -= 1
        return count

    def take(self, request: Request, hits: Columns) -> Cells:
        """Gives a request the columns that were found for it; returns the cells to write."""
        for pages in hits:
            self.allocator.take([page for page in pages if page != PADDING_PAGE])
        request.pages = [[] for _ in self.windows]
        return self._append(request, hits)

    def extend(self, request: Request, count: int) -> Cells:
        """Gives it so many columns more; returns the cells to write.

        Raises:
            MemoryError: there are too few pages.
        """
        pages = self.allocator.allocate(count * self.num_tables)
        return self._append(request, [pages[t :: self.num_tables] for t in range(self.num_tables)])

    def _append(self, request: Request, columns: Columns) -> Cells:
        cells: Cells = []
        for table, (own, pages) in enumerate(zip(request.pages, columns)):
            row = table * self._num_rows + request.row
            cells += [(row, column, page) for column, page in enumerate(pages, len(own))]
            own += pages
        return cells

    # --- after a step ------------------------------------------------------------------------

    def register(self, decision: Decision) -> None:
        """Makes the columns findable that a completed step filled to the end. Those of requests
        whose logits turn out to be bad are forgotten again before anybody looks for them."""
        size = self.allocator.page_size
        end = decision.start + decision.num_scheduled_tokens
        firsts, lasts = decision.start // size, end // size
        for lane in (firsts < lasts).nonzero()[0].tolist():
            request, last = decision.requests[lane], int(lasts[lane])
            # Who lost the pages since has others; who ended has none.
            if request.num_preemptions != decision.num_preemptions[lane] or not request.pages:
                continue
            self.hash_columns(request, last)
            filled = slice(int(firsts[lane]), last)
            for table, pages in enumerate(request.pages):
                for page, hash_ in zip(pages[filled], request.page_hashes[filled]):
                    self.allocator.register(page, _key(hash_, table))

    def free_unseen(self, decision: Decision) -> None:
        """Gives pages back that no query after a completed step sees."""
        start = decision.start
        end = start + decision.num_scheduled_tokens
        for table, window in self._windowed:
            size = self.allocator.page_size
            firsts = (start - window + 1).clip(0) // size
            lasts = (end - window + 1).clip(0) // size
            for lane in (firsts < lasts).nonzero()[0].tolist():
                request = decision.requests[lane]
                if request.num_preemptions != decision.num_preemptions[lane] or not request.pages:
                    continue
                own = request.pages[table]
                unseen = range(int(firsts[lane]), int(lasts[lane]))
                self.allocator.free([own[c] for c in unseen if own[c] != PADDING_PAGE])
                for column in unseen:
                    own[column] = PADDING_PAGE

    def release(self, request: Request) -> None:
        """Takes all its pages away."""
        for pages in request.pages:
            self.allocator.free([page for page in pages if page != PADDING_PAGE])
        request.pages = []

    def forget(self, request: Request) -> None:
        """Makes its columns unfindable, because what was written to them can't be trusted."""
        for table in range(self.num_tables):
            self.allocator.forget(_key(hash_, table) for hash_ in request.page_hashes)

    def hash_columns(self, request: Request, count: int) -> None:
        """Makes sure that the hashes of the first so many columns are known."""
        size, hashes = self.allocator.page_size, request.page_hashes
        root = self._hash_root(request)
        if request.hash_root != root:
            request.hash_root = root
            hashes.clear()
        for index in range(len(hashes), count):
            parent = hashes[-1] if hashes else root
            tokens = request.token_ids[index * size : (index + 1) * size]
            hashes.append(page_hash(parent, tokens))

    def _hash_root(self, request: Request) -> bytes:
        """What its first column's hash is chained to. It differs where keys are rotated otherwise;
        who runs has more than ``long_rope_len`` tokens only if it was admitted so."""
        if self._long_rope_len is None or len(request.token_ids) <= self._long_rope_len:
            return request.cache_salt
        return hashlib.blake2b(request.cache_salt, digest_size=16, person=b"long rope").digest()

    def _first_seen(self, window: int | None, position: int) -> int:
        """The first column that a query at ``position`` sees."""
        if window is None:
            return 0
        return max(position - window + 1, 0) // self.allocator.page_size


def most_pages(
    windows: Sequence[int | None], num_tokens: int, page_size: int, num_tokens_ahead: int
) -> int:
    """Most pages that a request of so many tokens holds at a time; see PageTables."""
    columns, total = -(-num_tokens // page_size), 0
    for window in windows:
        if window is None:
            total += columns
        else:  # its first and its last column may be seen in part
            total += min(columns, -(-(window + num_tokens_ahead) // page_size) + 1)
    return total


def longest_sequence(
    windows: Sequence[int | None], num_pages: int, page_size: int, num_tokens_ahead: int
) -> int:
    """Tokens of the longest request for which so many pages are enough; a multiple of
    ``page_size``, and endless (2**40) where windows keep it small."""
    low, high = 0, 2**40 // page_size
    while low < high:
        middle = (low + high + 1) // 2
        if most_pages(windows, middle * page_size, page_size, num_tokens_ahead) <= num_pages:
            low = middle
        else:
            high = middle - 1
    return low * page_size


def held(columns: Columns) -> int:
    """Pages in columns."""
    return sum(len(pages) - pages.count(PADDING_PAGE) for pages in columns)


def flat(columns: Columns) -> Iterator[int]:
    """The pages in columns."""
    return (page for pages in columns for page in pages if page != PADDING_PAGE)


def _key(hash_: bytes, table: int) -> bytes:
    """What a column's page in a table is known by."""
    return hash_ if table == 0 else hash_ + bytes([table])
