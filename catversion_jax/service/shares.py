"""Fair turns on the device: training and drawing get their shares of its time while both wait."""

from collections.abc import Collection, Mapping


class Shares:
    """Whose turn it is, by weighted fair queueing: whoever has had the least time, measured by his share."""

    def __init__(self, shares: Mapping[str, float]):
        """`shares` are parts of the time by kind of work, each above 0."""
        self._shares = dict(shares)
        self._had = dict.fromkeys(shares, 0.0)  # seconds over share
        self._waiting: set[str] = set()
        self._now = 0.0

    def next(self, waiting: Collection[str]) -> str | None:
        """Returns the kind of work whose turn it is, of those that wait; None if none does."""
        for kind in set(waiting) - self._waiting:
            # Who was away saves up nothing: the others need not wait until he has caught up.
            self._had[kind] = max(self._had[kind], self._now)
        self._waiting = set(waiting)
        if not waiting:
            return None
        chosen = min(sorted(waiting), key=self._had.__getitem__)
        self._now = self._had[chosen]
        return chosen

    def spent(self, kind: str, seconds: float) -> None:
        """Notes the time that a turn took."""
        self._had[kind] += seconds / self._shares[kind]
