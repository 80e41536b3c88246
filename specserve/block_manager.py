"""KV memory as block ids: who holds which. Knows no tensors and no requests, only block tables."""

from collections.abc import Iterable


class BlockManager:
    """Hand out fixed-size blocks of token slots.

    A block table is a list of block ids that covers the token slots
    [0, len(table) * block_size) of one request, in order. Both engines use the same table.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} slots: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks in some table."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def extend(self, table: list[int], num_tokens: int) -> bool:
        """Grow `table` in place until it covers [0, num_tokens); if it cannot, change nothing.

        Returns:
            Whether it covers them now.
        """
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        if missing > 0:
            table += self._free[: -missing - 1 : -1]
            del self._free[-missing:]
        return True

    def truncate(self, table: list[int], num_tokens: int) -> None:
        """Give back, in place, the blocks of `table` beyond [0, num_tokens)."""
        keep = self.blocks_for(num_tokens)
        if keep < len(table):
            self._free += table[: keep - 1 : -1] if keep else table[::-1]
            del table[keep:]

    def release(self, table: list[int]) -> None:
        """Give back every block of `table` and empty it."""
        self.truncate(table, 0)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Assert that every block is free or in exactly one of `tables`."""
        held = [block_id for table in tables for block_id in table]
        everything = sorted(held + self._free)
        assert everything == list(range(self.num_blocks)), (
            f"{len(held)} held + {len(self._free)} free of {self.num_blocks} blocks: "
            "one is lost, foreign or held twice"
        )
