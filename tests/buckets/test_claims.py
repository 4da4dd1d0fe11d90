"""Claims on a bucket's folder: one process holds it, and who is not heard of for a while loses it."""

import msgspec
import pytest

from catversion_jax.utils import claims, records
from catversion_jax.utils.claims import Claim, found_claims, read_note
from catversion_jax.utils.errors import StorageError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.3)
    monkeypatch.setattr(claims, "LEASE", 2.0)


def test_one_holder_at_a_time(bucket):
    first, second = Claim(bucket, "run"), Claim(bucket, "run")
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    assert found_claims(bucket) == [("run", 2)]
    second.release()


def write_foreign(bucket, **changes) -> None:
    """Leaves the claim of a process of another machine, which is not heard of again."""
    note = msgspec.structs.replace(Claim(bucket, "run")._note, host="elsewhere", **changes)
    (bucket / ".claim-run-000001.json").write_bytes(records.encode(note).encode())


def test_a_host_that_was_lost(bucket):
    write_foreign(bucket)
    claim = Claim(bucket, "run")
    assert claim.take(), "after the lease"
    claim.release()


def test_a_killed_process_of_this_host_is_not_waited_for(bucket, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 1e9)
    note = msgspec.structs.replace(Claim(bucket, "run")._note, pid=2**22 + 1)  # above the largest pid
    (bucket / ".claim-run-000001.json").write_bytes(records.encode(note).encode())
    claim = Claim(bucket, "run")
    assert claim.take()
    claim.release()


def test_a_holder_that_was_only_slow_stops(bucket):
    slow = Claim(bucket, "run")
    assert slow.take()
    slow._ended.set()  # it hangs: no more beats
    slow._beats.join()
    other = Claim(bucket, "run")
    assert other.take()
    slow._ended.clear()
    slow._keep()  # it goes on, and finds the other
    with pytest.raises(StorageError, match="another process has taken over"):
        slow.check()
    slow.release()
    assert not read_note(bucket, "run", 2).released, "and leaves the other's claim alone"
    other.release()
