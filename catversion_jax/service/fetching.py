"""Photos that are fetched for concepts: each concept in a thread of its own, so that no slow server holds others up."""

import threading
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from catversion_jax.service.store import Accepted


class Fetched(NamedTuple):
    """A concept whose photos are there, or what went wrong."""

    entry: Accepted
    error: Exception | None


class Fetching:
    """The concepts whose photos are being fetched, at most `most` at a time."""

    def __init__(self, fetch: Callable[[Accepted], object], most: int):
        self._fetch, self._most = fetch, most
        self._running: set[str] = set()
        self.ended: deque[Fetched] = deque()
        """In the order in which they ended; whoever has dealt with one removes it."""

    @property
    def room(self) -> int:
        return self._most - len(self._running)

    def start(self, entry: Accepted) -> None:
        self._running.add(entry.id)
        # As a daemon: whatever a server does, it does not keep ours from stopping.
        threading.Thread(target=self._run, args=(entry,), name="fetching", daemon=True).start()

    def _run(self, entry: Accepted) -> None:
        error: Exception | None = None
        try:
            self._fetch(entry)
        except Exception as raised:
            error = raised
        self.ended.append(Fetched(entry, error))
        self._running.discard(entry.id)

    def drop(self, ids: Collection[str]) -> None:
        """Forgets concepts that have ended being fetched; of those that have not, nobody asks afterwards."""
        self.ended = deque(fetched for fetched in self.ended if fetched.entry.id not in ids)
