"""The page allocator against an oracle that remembers what was really written to each page."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from jaxserve.engine.page_allocator import PADDING_PAGE, PageAllocator, page_hash

TOKENS = st.lists(st.integers(0, 1), max_size=9)
SALTS = st.sampled_from([b"", b"tenant"])


def hashes_of(token_ids: list[int], page_size: int, salt: bytes = b"") -> list[bytes]:
    """Chained hashes of all full pages."""
    hashes: list[bytes] = []
    for end in range(page_size, len(token_ids) + 1, page_size):
        hashes.append(page_hash(hashes[-1] if hashes else salt, token_ids[end - page_size : end]))
    return hashes


@dataclass(eq=False)
class Sequence:
    """A live sequence; tokens up to ``num_written`` lie in its pages."""

    salt: bytes
    token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    num_written: int = 0


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, are written, grow, become findable and go, in any order."""

    @initialize(num_pages=st.integers(2, 12), page_size=st.integers(1, 3), caching=st.booleans())
    def start(self, num_pages: int, page_size: int, caching: bool) -> None:
        self.allocator = PageAllocator(num_pages, page_size, caching)
        self.live: list[Sequence] = []
        self.content: dict[int, tuple[bytes, list[int]]] = {}  # page -> its whole prefix

    def allocate(self, count: int) -> list[int]:
        taken = {page for sequence in self.live for page in sequence.pages}
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(MemoryError):
                self.allocator.allocate(count)
            assert self.allocator.num_free == free
            return []
        pages = self.allocator.allocate(count)
        assert len(set(pages)) == count == free - self.allocator.num_free
        assert not taken & set(pages)
        assert PADDING_PAGE not in pages
        return pages

    @rule(salt=SALTS, token_ids=TOKENS)
    def admit(self, salt: bytes, token_ids: list[int]) -> None:
        """A hit returns pages that hold just these tokens, behind just this prefix."""
        size = self.allocator.page_size
        hits = self.allocator.match(hashes_of(token_ids, size, salt))
        for index, page in enumerate(hits):
            assert self.content[page] == (salt, token_ids[: (index + 1) * size])
        left = self.allocator.num_free_after_taking(hits)
        missing = self.allocator.pages_for(len(token_ids)) - len(hits)
        if missing > left:
            return
        self.allocator.take(hits)
        assert self.allocator.num_free == left
        sequence = Sequence(salt, token_ids, list(hits), len(hits) * size)
        self.live.append(sequence)
        sequence.pages += self.allocate(missing)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token_ids=TOKENS)
    def grow(self, data: st.DataObject, token_ids: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        num_tokens = len(sequence.token_ids) + len(token_ids)
        count = self.allocator.pages_for(num_tokens) - len(sequence.pages)
        pages = self.allocate(count)
        if len(pages) == count:
            sequence.pages += pages
            sequence.token_ids = sequence.token_ids + token_ids

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """A step writes what is missing; its full pages may then be found."""
        sequence = data.draw(st.sampled_from(self.live))
        size, tokens = self.allocator.page_size, sequence.token_ids
        for index in range(sequence.num_written // size, len(sequence.pages)):
            prefix = tokens[: (index + 1) * size]
            self.content[sequence.pages[index]] = (sequence.salt, prefix)
        sequence.num_written = len(tokens)
        for page, hash_ in zip(sequence.pages, hashes_of(tokens, size, sequence.salt)):
            self.allocator.register(page, hash_)
        known = self.allocator.match(hashes_of(tokens, size, sequence.salt))
        assert len(known) == (len(tokens) // size if self.allocator.enable_prefix_caching else 0)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.allocator.free(sequence.pages)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        hashes = hashes_of(sequence.token_ids, self.allocator.page_size, sequence.salt)
        self.allocator.forget(hashes)
        assert self.allocator.match(hashes) == []

    @rule()
    def evict_all(self) -> None:
        pages = self.allocate(self.allocator.num_free)
        assert self.allocator.num_free == 0
        self.allocator.free(pages)

    @precondition(lambda self: not self.live)
    @rule()
    def reset(self) -> None:
        self.allocator.reset_prefix_cache()
        self.content.clear()

    @invariant()
    def books_balance(self) -> None:
        tables = [sequence.pages for sequence in self.live]
        self.allocator.check_integrity(tables)
        owned = {page for table in tables for page in table}
        assert self.allocator.num_free == self.allocator.num_usable - len(owned)

    @invariant()
    def shared_pages_have_one_content(self) -> None:
        """Whoever else owns a page, each owner reads back its own prefix."""
        size = self.allocator.page_size
        for sequence in self.live:
            for index in range(sequence.num_written // size):
                content = self.content[sequence.pages[index]]
                assert content == (sequence.salt, sequence.token_ids[: (index + 1) * size])


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=300, stateful_step_count=30)


def test_the_hash_of_a_page_covers_its_whole_prefix_and_the_salt() -> None:
    hashes = {
        page_hash(parent, tokens)
        for parent in (b"", b"salt", page_hash(b"", [1, 2]))
        for tokens in ([1, 2], [2, 1], [1, 3], [258, 0])
    }
    assert len(hashes) == 12
    assert page_hash(b"", [1, 2]) == page_hash(b"", (1, 2))


def test_the_page_freed_longest_ago_is_handed_out_first() -> None:
    allocator = PageAllocator(5, 1, enable_prefix_caching=True)
    first, second = allocator.allocate(2), allocator.allocate(2)
    allocator.free(second)
    allocator.free(first)
    assert allocator.allocate(4) == [*reversed(second), *reversed(first)]


def test_a_cached_page_is_found_until_it_is_handed_out_again() -> None:
    allocator = PageAllocator(3, 1, enable_prefix_caching=True)
    pages, hashes = allocator.allocate(2), hashes_of([7, 8], 1)
    for page, hash_ in zip(pages, hashes):
        allocator.register(page, hash_)
    allocator.free(pages)
    assert allocator.match(hashes) == pages
    allocator.allocate(1)
    assert allocator.match(hashes) == pages[:1], "the end of a prefix is given up first"
    allocator.allocate(1)
    assert allocator.match(hashes) == []


def test_a_page_is_no_hit_when_one_before_it_is_missing() -> None:
    allocator = PageAllocator(3, 1, enable_prefix_caching=True)
    hashes = hashes_of([7, 8], 1)
    allocator.register(allocator.allocate(2)[1], hashes[1])
    assert allocator.match(hashes) == []


def test_of_two_pages_with_equal_content_the_first_is_found() -> None:
    allocator = PageAllocator(3, 1, enable_prefix_caching=True)
    first, second = allocator.allocate(2)
    hash_ = page_hash(b"", [1])
    allocator.register(first, hash_)
    allocator.register(second, hash_)
    assert allocator.match([hash_]) == [first]
    allocator.check_integrity([[first, second]])


def test_a_page_freed_twice_is_an_error() -> None:
    allocator = PageAllocator(3, 1, enable_prefix_caching=False)
    pages = allocator.allocate(1)
    allocator.free(pages)
    with pytest.raises(RuntimeError, match="freed twice"):
        allocator.free(pages)


def test_the_cache_is_not_reset_under_a_running_request() -> None:
    allocator = PageAllocator(3, 1, enable_prefix_caching=True)
    pages = allocator.allocate(1)
    with pytest.raises(RuntimeError, match="no request runs"):
        allocator.reset_prefix_cache()
    allocator.register(pages[0], page_hash(b"", [1]))
    allocator.free(pages)
    allocator.reset_prefix_cache()
    assert allocator.match([page_hash(b"", [1])]) == []


@pytest.mark.parametrize(
    ("tables", "problem"),
    [([], "1 refs, 0 owners"), ([[1, 1]], "1 refs, 2 owners"), ([[1], [2]], "page 2")],
)
def test_check_integrity_names_the_page_that_is_wrong(tables: list, problem: str) -> None:
    allocator = PageAllocator(3, 1, enable_prefix_caching=True)
    assert allocator.allocate(1) == [1]
    allocator.check_integrity([[1]])
    with pytest.raises(RuntimeError, match=problem):
        allocator.check_integrity(tables)
