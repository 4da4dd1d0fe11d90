"""The queue, without Ray: who gets what, and what becomes of what a lost worker had."""

import random
from typing import NamedTuple

from catversion_jax.fleet.work_queue import TOGETHER, WorkQueue


class Job(NamedTuple):
    id: str


def queue_of(count: int, slots: int = 2, workers: str = "", **saved: tuple[str, ...]) -> WorkQueue[Job]:
    queue = WorkQueue(iter([Job(str(i)) for i in range(count)]), slots, saved)
    for worker in workers:
        queue.join(worker, worker)
    return queue


def ids(tasks) -> list[str]:
    return [task.job.id for task in tasks]


def test_a_worker_has_its_slots_twice_and_the_manifest_is_read_as_it_goes():
    read = []
    queue = WorkQueue((read.append(i) or Job(str(i)) for i in range(10**9)), 3)
    queue.join("a", "a")
    assert ids(queue.hand("a")) == ["0", "1", "2", "3", "4", "5"]
    assert queue.hand("a") == []
    assert len(read) == 7
    queue.heard("a", ["0", "2"], ["1", "3", "4"], [])
    assert ids(queue.hand("a")) == ["6", "7"]


def test_what_was_saved_before_is_told_once():
    queue = queue_of(2, 1, "a", **{"1": ("x", "y")})
    assert [task.saved_by for task in queue.hand("a")] == [(), ("x", "y")]


def test_a_lost_workers_concepts_go_to_others():
    queue = queue_of(4, 1, "ab")
    assert ids(queue.hand("a")) == ["0", "1"]
    queue.leave("a")
    assert [(task.job.id, task.saved_by, task.crashes) for task in queue.hand("b")] == [
        ("0", ("a",), 0),
        ("1", ("a",), 0),
    ]
    queue.heard("b", ["0", "1"], [], [])
    assert ids(queue.hand("b")) == ["2", "3"]


def test_at_the_end_what_is_not_begun_goes_to_who_is_free():
    queue = queue_of(6, 3, "ab")
    assert len(queue.hand("a")) == 6
    assert queue.hand("b") == []
    assert queue.to_return("a") == 3
    queue.heard("a", [], ["0", "1", "2"], ["5", "4", "3"])
    assert queue.hand("a") == []
    assert ids(queue.hand("b")) == ["5", "4", "3"]
    assert queue.to_return("a") == queue.to_return("b") == 0


def test_the_concept_with_which_workers_crash_fails_and_no_other():
    """Sixteen at once, then four, then one: three crashes."""
    queue, failed, ended, crashes = queue_of(40, 8), [], set(), 0
    for number in range(100):
        worker = f"w{number}"
        queue.join(worker, worker)
        while queue.hand(worker):
            pass
        while (tasks := queue.hands[worker].tasks) and "7" not in tasks:
            most = TOGETHER[queue.hands[worker].crashes]
            assert most is None or len(tasks) <= most
            one = min(tasks)
            queue.heard(worker, [one], [], [])
            ended.add(one)
            queue.hand(worker)
        if not tasks:
            break
        crashes += 1
        failed += [job.id for job in queue.crashed(worker)]
    assert failed == ["7"]
    assert crashes == 3
    assert ended == {str(i) for i in range(40)} - {"7"}
    assert queue.is_over


def test_whatever_happens_each_concept_ends_once():
    for seed in range(200):
        rng = random.Random(seed)
        slots, count = rng.randint(1, 4), rng.randint(1, 40)
        queue, ended, names = queue_of(count, slots), [], iter(range(10**6))
        for _ in range(10_000):
            if queue.is_over:
                break
            if not queue.hands or (len(queue.hands) < 4 and rng.random() < 0.1):
                queue.join(f"w{next(names)}", rng.choice("xyz"))
            worker = rng.choice(list(queue.hands))
            queue.hand(worker)
            tasks = list(queue.hands[worker].tasks)
            assert len(tasks) <= 2 * slots
            begun = tasks[:slots]
            chance = rng.random()
            if chance < 0.05:
                queue.leave(worker)
            elif chance < 0.08:
                ended += [job.id for job in queue.crashed(worker)]
            elif begun:
                asked = queue.to_return(worker)
                returned = [task for task in tasks[::-1] if task not in begun][:asked]
                queue.heard(worker, begun[:1], begun[1:], returned)
                ended += begun[:1]
        assert sorted(ended, key=int) == [str(i) for i in range(count)], seed


def test_what_was_handed_back_and_then_crashed_goes_to_the_other_node():
    queue = queue_of(2, 1, "ab")
    assert ids(queue.hand("a")) == ["0", "1"]
    queue.heard("a", [], ["0"], ["1"])
    assert ids(queue.hand("b")) == ["1"]
    assert queue.crashed("b") == []
    queue.heard("a", ["0"], [], [])
    queue.join("b2", "b")
    assert queue.hand("b2") == []
    assert ids(queue.hand("a")) == ["1"]
    assert queue.to_return("a") == 0


def test_concepts_come_and_go_while_it_is_at_work():
    queue = queue_of(0, 2, "ab")
    assert queue.is_over
    for name in "xyz":
        queue.add(Job(name))
    assert ids(queue.hand("a")) == ["x", "y"]
    queue.cancel("y")
    queue.cancel("z")
    assert queue.take_cancelled("a") == ["y"]
    assert queue.take_cancelled("a") == []
    assert queue.hand("b") == []
    # It had ended before the worker was told.
    queue.heard("a", ["y"], ["x"], ["y"])
    assert not queue.is_over
    queue.heard("a", ["x"], [], [])
    assert queue.is_over


def test_what_fits_into_a_workers_slots_stays_with_it():
    """Concepts do not travel between workers that all have empty slots."""
    queue = queue_of(0, 8, "ab")
    for i in range(8):
        queue.add(Job(str(i)))
    assert [len(queue.hand(worker)) for worker in "ab"] == [4, 4]
    for worker in "ab":
        assert queue.to_return(worker) == 0
        assert queue.hand(worker) == []
    queue.heard("a", [], ["0"], [])
    assert queue.to_return("a") == 0


def test_a_worker_that_joins_takes_work_at_once():
    """What waits, and what others have beyond their slots."""
    queue = queue_of(9, 2, "ab")
    assert [len(queue.hand(worker)) for worker in "ab"] == [4, 4]
    queue.join("c", "c")
    assert ids(queue.hand("c")) == ["8"]
    assert queue.to_return("a") == 1
    queue.heard("a", [], ["0", "1"], ["3"])
    assert ids(queue.hand("c")) == ["3"]


def test_what_a_lost_worker_had_is_shared_by_all_that_are_free():
    queue = queue_of(4, 2, "abcd")
    assert ids(queue.hand("a")) == ["0", "1", "2", "3"]
    queue.leave("a")
    assert [len(queue.hand(worker)) for worker in "bcd"] == [2, 1, 1]
