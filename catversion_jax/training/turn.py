"""A turn: one dispatch of the engine, or some, and what came of them for each concept."""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from catversion_jax.config import Config
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.engine import Ended, Engine
from catversion_jax.training.loop import is_due


class Snapshot(NamedTuple):
    """What a concept has learned by a step, to be shown as previews."""

    id: str
    step: int
    concept: Concept
    config: Config


class Point(NamedTuple):
    """How far a concept has come."""

    step: int
    loss: float


class Turn(NamedTuple):
    """What came of a turn."""

    ended: tuple[Ended, ...] = ()
    points: Mapping[str, Point] = {}  # by id, of the concepts that were in the slots
    snapshots: tuple[Snapshot, ...] = ()
    steps: int = 0  # of all concepts
    seconds_per_step: float = 0.0  # of all slots together

    def then(self, later: "Turn") -> "Turn":
        """Returns what came of this turn and of a later one."""
        return Turn(
            self.ended + later.ended,
            {**self.points, **later.points},
            self.snapshots + later.snapshots,
            self.steps + later.steps,
            later.seconds_per_step or self.seconds_per_step,
        )


def take_turn(engine: Engine, every: int) -> Turn:
    """Runs one dispatch; every so many steps of a concept, there is a snapshot of it (0: never)."""
    begun = time.monotonic()
    before = {index: int(engine.slots.host.step[index]) for index in engine.entered}
    ids = {index: entered.job.id for index, entered in engine.entered.items()}
    ended = engine.advance()
    seconds_per_step = (time.monotonic() - begun) / engine.length
    # The slot of one that failed is empty, at step 0.
    steps = {index: max(step, int(engine.slots.host.step[index])) for index, step in before.items()}
    points = {ids[index]: Point(step, float(engine.slots.losses[index])) for index, step in steps.items()}
    taken = sum(steps.values()) - sum(before.values())
    return Turn(tuple(ended), points, tuple(snapshots(engine, before, every)), taken, seconds_per_step)


def snapshots(engine: Engine, before: Mapping[int, int], every: int) -> Iterator[Snapshot]:
    """Yields what the concepts have learned that passed a multiple of `every`; `before` are their steps, by slot."""
    for index, entered in engine.entered.items():
        job, step = entered.job, int(engine.slots.host.step[index])
        if any(is_due(passed, every) for passed in range(before[index] + 1, step + 1)):
            yield Snapshot(job.id, step, engine.concept_now(index), job.config)
