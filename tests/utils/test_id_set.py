"""A set of names that takes little memory."""

import random

from catversion_jax.utils.id_set import WIDTH, IdSet


def test_it_is_a_set():
    rng, ours, theirs = random.Random(0), IdSet(["a"]), {"a"}
    for _ in range(20_000):
        name = f"concept-{rng.randrange(12_000)}"
        assert ours.add(name) == (name not in theirs)
        theirs.add(name)
    assert len(ours) == len(theirs)
    assert all((f"concept-{i}" in ours) == (f"concept-{i}" in theirs) for i in range(13_000))
    assert "\ud800" not in ours


def test_it_takes_at_most_48_bytes_a_name():
    ours = IdSet(map(str, range(100_000)))
    assert 1.5 * WIDTH * len(ours) <= len(ours._table) <= 3 * WIDTH * len(ours)
