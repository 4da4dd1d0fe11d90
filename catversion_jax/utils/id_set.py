"""A set of names in 24 to 48 bytes each: a manifest may have millions, which as strings would fill gigabytes."""

import hashlib
from collections.abc import Iterable

WIDTH = 16
"""Bytes of a name's hash: the chance that any two of a million names have the same is 1 in 10^26."""
EMPTY = bytes(WIDTH)


class IdSet:
    """The names that were added, as a table of their hashes; it is at most two thirds full."""

    def __init__(self, names: Iterable[str] = ()):
        self._table, self._count = bytearray(WIDTH * 1024), 0
        for name in names:
            self.add(name)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        return self._place(hash_of(name))[1]

    def add(self, name: str) -> bool:
        """Adds a name; returns whether it is new."""
        digest = hash_of(name)
        offset, is_there = self._place(digest)
        if is_there:
            return False
        self._table[offset : offset + WIDTH] = digest
        self._count += 1
        if 3 * WIDTH * self._count > 2 * len(self._table):
            self._grow()
        return True

    def _place(self, digest: bytes) -> tuple[int, bool]:
        """Returns where in the table a hash is or would be, and whether it is there."""
        table = self._table
        offset = WIDTH * (int.from_bytes(digest[:8]) % (len(table) // WIDTH))
        while (found := table[offset : offset + WIDTH]) != EMPTY:
            if found == digest:
                return offset, True
            offset = (offset + WIDTH) % len(table)
        return offset, False

    def _grow(self) -> None:
        old = self._table
        self._table = bytearray(2 * len(old))
        for start in range(0, len(old), WIDTH):
            digest = bytes(old[start : start + WIDTH])
            if digest != EMPTY:
                offset, _ = self._place(digest)
                self._table[offset : offset + WIDTH] = digest


def hash_of(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=WIDTH).digest()
