"""File names of sampled images: a slug of the prompt, a key of settings and concepts, and the seed."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from catversion_jax.utils.paths import AnyPath

SLUG_LENGTH = 80
SLUG_BYTES = 200
"""File systems take names of 255 bytes; the key, the seed and the ending follow the slug."""
GRID = re.compile(r"grid(_\d+)?\.png")
"""File names of image grids, which are in the same folder as the images."""
NAMED = re.compile(r"(?P<slug>.+?)(_(?P<key>[0-9a-f]{8}))?_\d+")
"""Stem of an image's file name: slug, key and seed; older names have no key."""


def slug(prompt: str) -> str:
    """Returns a file name for a prompt; a shortened one ends in a hash, so that long prompts do not collide."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    if words and len(words) <= SLUG_LENGTH and len(words.encode()) <= SLUG_BYTES:
        return words
    start = words[:SLUG_LENGTH].encode()[: SLUG_BYTES - 9].decode(errors="ignore")
    return f"{start.rstrip('-')}-{short_hash(prompt)}".strip("-")


def short_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def unique_slugs(prompts: Sequence[str]) -> list[str]:
    """Returns a slug for each prompt; prompts that differ only in punctuation get a hash."""
    slugs = [slug(prompt) for prompt in prompts]
    count = Counter(slugs)
    return [s if count[s] == 1 else f"{s}-{short_hash(prompt)}" for s, prompt in zip(slugs, prompts, strict=True)]


def free_grid_name(folder: AnyPath) -> AnyPath:
    """Returns grid.png or, if it exists, the first free grid_N.png."""
    names = (folder / (f"grid_{i}.png" if i else "grid.png") for i in range(10**6))
    return next(path for path in names if not path.exists())
