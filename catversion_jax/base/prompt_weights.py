"""Weights in a prompt, as people write them: `a (red:1.3) teapot` reads "red" with a weight of 1.3.

    (red)       1.1, and 1.1 times as much for each further pair of parentheses
    (red:0.5)   0.5, whatever stands around it
    \\( and \\)   parentheses that are meant

This is the notation of AUTOMATIC1111's web UI as ComfyUI reads it (comfy/sd1_clip.py), unpaired parentheses included.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

from catversion_jax.utils.errors import UserError

EMPHASIS = 1.1
MOST_WEIGHT = 1000.0
MOST_DEPTH = 100


@lru_cache(1024)  # a prompt is read for each text encoder and each concept
def weighted_parts(prompt: str) -> tuple[tuple[str, float], ...]:
    """Returns the parts of a prompt with their weights, in order.

    Raises UserError for a weight beyond MOST_WEIGHT and for parentheses that are nested deeper than MOST_DEPTH.
    """
    parts = tuple(parts_of(re.findall(r"\\[()]|.", prompt, re.DOTALL), 1.0, prompt, 0))
    for text, weight in parts:
        if not abs(weight) <= MOST_WEIGHT:
            raise UserError(
                f"prompt {prompt!r:.200}: the weight of {text!r:.60} is {weight:g}; expected at most {MOST_WEIGHT:g}"
            )
    return parts


def parts_of(signs: Sequence[str], weight: float, prompt: str, depth: int) -> Iterator[tuple[str, float]]:
    """Yields the parts of what is inside `depth` parentheses."""
    if depth > MOST_DEPTH:
        raise UserError(f"prompt {prompt!r:.200}: more than {MOST_DEPTH} parentheses in each other; expected fewer")
    for piece in pieces(signs):
        inner, of_inner, is_group = piece_weight(piece, weight)
        if is_group:
            yield from parts_of(inner, of_inner, prompt, depth + 1)
        else:
            yield "".join(sign[-1] if len(sign) == 2 else sign for sign in inner), of_inner


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
