"""What a study keeps of each row, in JSON: the types that check it when it is read back."""

from typing import Any, TypedDict

Interval = tuple[float, float] | None


class Costs(TypedDict):
    """A setting, and what it took."""

    group: str
    name: str
    seconds: float | None  # per concept; None: the training was interrupted
    numbers: int  # parameters learned for a concept


class CandidateRow(Costs):
    """A setting that is tried to choose a method's learning rate, timesteps and strength."""

    fitness: list[tuple[float, float | None]]  # strength, and the overall score at it; None: NaN


class CurveRow(TypedDict):
    """A method's scores over strengths."""

    points: list[tuple[float, float, float]]  # strength, CLIP-I, CLIP-T


class ScoredRow(Costs):
    """A line of a table. A score is None where it was not measured."""

    clip_t: float | None
    clip_i: float | None
    masked_clip_i: float | None
    overall: float | None
    prior_drift: float | None
    prior_drift_text: float | None
    accuracy: dict[str, float | None]  # by the names of accuracy.NAMES
    copied: float | None
    intervals: dict[str, Interval]
    concepts: list[dict[str, Any]]


class GroupRow(TypedDict):
    """One of several concepts in a prompt."""

    concept: str
    base: float
    alone: float
    together: float
    shown: float


class GroupRows(TypedDict):
    """Several concepts in one prompt."""

    rows: list[GroupRow]
    all: float
    variants: list[str]
