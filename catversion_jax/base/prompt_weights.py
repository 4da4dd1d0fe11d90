"""Weights in a prompt, as people write them: `a (red:1.3) teapot` reads "red" with a weight of 1.3.

    (red)       1.1, and 1.1 times as much for each further pair of parentheses
    (red:0.5)   0.5, whatever stands around it
    \\( and \\)   parentheses that are meant

This is the notation of AUTOMATIC1111's web UI as ComfyUI reads it (comfy/sd1_clip.py), unpaired parentheses included.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from catversion_jax.utils.errors import UserError

EMPHASIS = 1.1


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """Returns the parts of a prompt with their weights, in order. Raises UserError for a weight that is not finite."""
    parts = []
    # Behind it are the parts that are still to be taken apart: a prompt may nest deeper than Python calls.
    waiting: list[tuple[Sequence[str], float, bool]] = [(re.findall(r"\\[()]|.", prompt, re.DOTALL), 1.0, True)]
    while waiting:
        signs, weight, is_open = waiting.pop()
        if is_open:
            waiting += [(*piece_weight(piece, weight),) for piece in reversed(list(pieces(signs)))]
        else:
            parts.append(("".join(sign[-1] if len(sign) == 2 else sign for sign in signs), weight))
    for text, weight in parts:
        if not math.isfinite(weight):
            raise UserError(f"prompt {prompt!r:.200}: the weight of {text!r:.60} is {weight}; expected a finite number")
    return parts


def pieces(signs: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yields what is in parentheses and what is between, for the outermost ones alone."""
    depth = start = 0
    for i, sign in enumerate(signs):
        if sign == "(":
            if depth == 0 and i > start:
                yield signs[start:i]
                start = i
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth == 0:
                yield signs[start : i + 1]
                start = i + 1
    if start < len(signs):
        yield signs[start:]


def piece_weight(piece: Sequence[str], weight: float) -> tuple[Sequence[str], float, bool]:
    """Returns a piece without its parentheses and its number, its weight, and whether it may hold further ones."""
    if len(piece) < 2 or (piece[0], piece[-1]) != ("(", ")"):
        return piece, weight, False
    inner, weight = piece[1:-1], weight * EMPHASIS
    colon = max((i for i, sign in enumerate(inner) if sign == ":"), default=0)
    if colon > 0:
        with suppress(ValueError):
            return inner[:colon], float("".join(inner[colon + 1 :])), True
    return inner, weight, True
