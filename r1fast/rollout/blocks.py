"""Which blocks of the cache are free, and how many sequences hold each of the others."""


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free_blocks)

    def num_references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        assert count <= self.num_free, f"{count=} {self.num_free=}"
        blocks = [self._free_blocks.pop() for _ in range(count)]
        self.add_reference(blocks)
        return blocks

    def add_reference(self, blocks: list[int]) -> None:
        for block in blocks:
            self._references[block] += 1

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            assert self._references[block] >= 0, f"{block=} is free"
            if self._references[block] == 0:
                self._free_blocks.append(block)
