"""Turns on the device: whoever waits gets his share of the time, and no more."""

import pytest

from catversion_jax.service.shares import Shares


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_each_gets_his_share(share):
    """However long the turns of each take."""
    shares, seconds = Shares({"train": 1 - share, "draw": share}), {"train": 0.0, "draw": 0.0}
    for _ in range(3000):
        kind = shares.next(["train", "draw"])
        took = {"train": 1.7, "draw": 0.6}[kind]
        seconds[kind] += took
        shares.spent(kind, took)
    assert seconds["draw"] / sum(seconds.values()) == pytest.approx(share, abs=0.01)


def test_whoever_was_away_saves_nothing_up():
    """After an hour of training alone, drawing gets its share, and not the hour; and the other way round."""
    for alone, other in (("train", "draw"), ("draw", "train")):
        shares = Shares({"train": 0.5, "draw": 0.5})
        for _ in range(3600):
            assert shares.next([alone]) == alone
            shares.spent(alone, 1.0)
        turns = []
        for _ in range(10):
            turns.append(shares.next(["train", "draw"]))
            shares.spent(turns[-1], 1.0)
        assert 4 <= turns.count(other) <= 6


def test_the_wait_is_bounded():
    """A picture that comes while others train waits for one turn of theirs, at equal shares."""
    shares = Shares({"train": 0.5, "draw": 0.5})
    for _ in range(100):
        shares.spent(shares.next(["train"]), 2.0)
        waited = 0
        while shares.next(["train", "draw"]) == "train":
            shares.spent("train", 2.0)
            waited += 1
        shares.spent("draw", 0.5)
        assert waited <= 1


def test_nobody_waits():
    assert Shares({"train": 0.5, "draw": 0.5}).next([]) is None
