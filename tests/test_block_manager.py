"""Blocks are handed out once, come back, and never get lost."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from specserve.block_manager import BlockManager


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_empty_memory_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(num_blocks, block_size)


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_block_is_needed_for_every_started_block_of_tokens(
    num_tokens: int, expected: int
) -> None:
    assert BlockManager(8, 4).blocks_for(num_tokens) == expected


def test_extend_keeps_the_blocks_a_table_has() -> None:
    blocks, table = BlockManager(8, 4), []
    assert blocks.extend(table, 5)
    before = list(table)
    assert blocks.extend(table, 9)
    assert table[:2] == before
    assert len(set(table)) == 3


def test_extend_that_does_not_fit_changes_nothing() -> None:
    blocks, table = BlockManager(3, 4), []
    blocks.extend(table, 4)
    assert not blocks.extend(table, 13)
    assert len(table) == 1
    assert blocks.num_free_blocks == 2


def test_extend_never_shrinks() -> None:
    blocks, table = BlockManager(3, 4), []
    blocks.extend(table, 12)
    assert blocks.extend(table, 1)
    assert len(table) == 3


def test_truncate_gives_back_only_the_blocks_beyond() -> None:
    blocks, table = BlockManager(4, 4), []
    blocks.extend(table, 16)
    first, second = table[:2]
    blocks.truncate(table, 5)
    assert table == [first, second]
    assert blocks.num_free_blocks == 2
    blocks.truncate(table, 8)
    assert len(table) == 2


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param([[0], [0]], id="held twice"),
        pytest.param([[0, 1, 2, 3, 99]], id="foreign"),
        pytest.param([[]], id="lost"),
        pytest.param([[0, 3]], id="held and free"),
    ],
)
def test_integrity_check_sees_what_is_wrong(tables: list[list[int]]) -> None:
    blocks = BlockManager(4, 4)
    blocks.extend([], 4)  # a table that is forgotten: block 0 is neither free nor held
    with pytest.raises(AssertionError, match="lost, foreign or held twice"):
        blocks.check_integrity(tables)


class Tables(RuleBasedStateMachine):
    """Random growth, truncation and release of a few tables."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(9, 3)
        self.tables: list[list[int]] = [[], [], []]

    @rule(i=st.integers(0, 2), num_tokens=st.integers(0, 30))
    def extend(self, i: int, num_tokens: int) -> None:
        """Grow one table; it covers the tokens iff there was room."""
        missing = self.blocks.blocks_for(num_tokens) - len(self.tables[i])
        fits = missing <= self.blocks.num_free_blocks
        assert self.blocks.extend(self.tables[i], num_tokens) == fits
        assert not fits or len(self.tables[i]) * 3 >= num_tokens

    @rule(i=st.integers(0, 2), num_tokens=st.integers(0, 30))
    def truncate(self, i: int, num_tokens: int) -> None:
        """Shrink one table."""
        self.blocks.truncate(self.tables[i], num_tokens)
        assert len(self.tables[i]) <= self.blocks.blocks_for(num_tokens)

    @rule(i=st.integers(0, 2))
    def release(self, i: int) -> None:
        """Empty one table."""
        self.blocks.release(self.tables[i])
        assert self.tables[i] == []

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every block is free or in exactly one table."""
        self.blocks.check_integrity(self.tables)
        assert self.blocks.num_used_blocks == sum(map(len, self.tables))


TestTables = Tables.TestCase
