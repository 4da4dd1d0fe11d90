"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table: the first two columns are text, the others right-aligned numbers. No newline at the end."""
    rule = ["---"] * 2 + ["--:"] * (len(header) - 2)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))
