"""The tables of a study, in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from catversion_jax.evaluation.page import format_score
from catversion_jax.study import accuracy
from catversion_jax.study.settings import CURVE, STRENGTHS
from catversion_jax.utils import markdown

Row = Mapping[str, Any]
"""One of study/rows.py."""


def score_cell(name: str) -> Callable[[Row], str]:
    return lambda row: format_score(row[name], row["intervals"][name])


def seconds(row: Row) -> str:
    return "" if row["seconds"] is None else f"{row['seconds']:.0f}"


def numbers(row: Row) -> str:
    return f"{row['numbers']:,}" if row["numbers"] else ""


LABELS = (("", lambda row: row["group"]), ("setting", lambda row: row["name"]))
SCORED = (
    ("CLIP-T", score_cell("clip_t")),
    ("CLIP-I", score_cell("clip_i")),
    ("masked CLIP-I", score_cell("masked_clip_i")),
    ("overall", score_cell("overall")),
    ("background copied", lambda row: format_score(row["copied"])),
    ("prior drift", score_cell("prior_drift")),
    ("drift of text", score_cell("prior_drift_text")),
)
COST = (("numbers learned", numbers), ("seconds a concept", seconds))
"""Columns: header, and the cell for a row."""


def table_of(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]) -> str:
    """Returns a Markdown table with a line for each row."""
    return markdown.table([name for name, _ in columns], ([cell(row) for _, cell in columns] for row in rows)) + "\n"


def of_scores(rows: Sequence[Row]) -> str:
    return table_of(rows, (*LABELS, *SCORED, *COST))


def of_accuracies(rows: Sequence[Row]) -> str:
    """Returns the table of accuracies by the nearest caption."""

    def cell(name: str) -> Callable[[Row], str]:
        return lambda row: format_score(row["accuracy"][name], row["intervals"].get(name))

    return table_of(rows, (*LABELS, *((name.replace("_", " "), cell(name)) for name in accuracy.NAMES)))


def of_candidates(rows: Sequence[Row]) -> str:
    """Returns the table of the settings tried for each method, with the strength at which one was chosen."""

    def at(index: int) -> Callable[[Row], str]:
        return lambda row: format_score(row["fitness"][index][1])

    tried = [(f"overall at strength {x:g}, on the photos learned from", at(i)) for i, x in enumerate(STRENGTHS)]
    chosen = ("chosen", lambda row: "" if row["chosen"] is None else f"at {row['chosen']:g}")
    return table_of(rows, (*LABELS, *tried, chosen, *COST))


def of_curves(curves: Mapping[str, Row]) -> str:
    """Returns the table of each method's image and text alignment over strengths."""

    def at(index: int) -> Callable[[Row], str]:
        return lambda row: "{:.3f} / {:.3f}".format(*row["points"][index][1:])

    rows = [{"method": method, **row} for method, row in curves.items()]
    columns = [(f"CLIP-I / CLIP-T at {x:g}", at(i)) for i, x in enumerate(CURVE)]
    return table_of(rows, [("method", lambda row: row["method"]), *columns])


def of_groups(groups: Mapping[str, Row]) -> str:
    """Returns the table with a line for each concept of each group; `groups` are by name."""
    rows = [{**row, "group": name, "all": group["all"]} for name, group in groups.items() for row in group["rows"]]
    columns = (
        ("prompt", lambda row: row["group"].replace("-", " ")),
        ("concept", lambda row: row["concept"]),
        ("at its word: base model", lambda row: format_score(row["base"])),
        ("this concept alone", lambda row: format_score(row["alone"])),
        ("all", lambda row: format_score(row["together"])),
        ("shown", lambda row: f"{row['shown']:.0%}"),
        ("all shown", lambda row: f"{row['all']:.0%}"),
    )
    return table_of(rows, columns)
