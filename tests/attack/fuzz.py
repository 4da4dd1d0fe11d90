"""Throws mutated inputs at every reader: none may raise an error that is not reported in a line, hang or crash.

    python -m tests.attack.fuzz --count=3000

A sealed reader (a concept, a checkpoint, stored photos) must also notice every change of what it reads. Each reader
runs in a process of its own, which a crash ends; the inputs depend on --seed alone.
"""

import argparse
import contextlib
import json
import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import MOST_CHARACTERS, ReportedError, one_line
from tests.attack.mutations import of_file
from tests.attack.readers import READERS, Reader
from tests.commands import ROOT

SECONDS = 30
"""After which an input counts as a hang."""
MEMORY = 4 * 2**30
"""Bytes that a process may take beyond what it had before the first input."""
OUTCOMES = ("tried", "refused", "accepted", "tracebacks", "hangs", "crashes", "silent", "messages", "memory")
FAULTS = OUTCOMES[3:]


class HangError(BaseException):
    """Not an Exception, so that no reader takes it for an error of its own."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def ring(*_):
        raise HangError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def mutate(folder: Path, reader: Reader, rng: random.Random) -> str:
    """Changes one file of the input; returns its name."""
    path = rng.choice(sorted(path for path in folder.glob(reader.files) if path.is_file()))
    data = path.read_bytes()
    changed = data
    for _ in range(10):
        changed = (reader.mutation or rng.choice(of_file(path.name)))(data, rng)
        if changed != data:
            break
    path.write_bytes(changed)
    return str(path.relative_to(folder))


def attempt(reader: Reader, folder: Path, expected: Any) -> tuple[str, str]:
    """Reads an input; returns the outcome, one of OUTCOMES, and what there is to say about it."""
    try:
        with time_limit(SECONDS):
            found = reader.read(folder)
    except ReportedError as error:
        return ("refused", "") if is_good_message(str(error)) else ("messages", str(error))
    except OSError as error:  # which the command line reports in a line
        return "refused", str(error)
    except HangError:
        return "hangs", ""
    except Exception:
        return "tracebacks", traceback.format_exc()[-3000:]
    if reader.sealed and found != expected:
        return "silent", "accepted, and not what was written"
    return "accepted", ""


def is_good_message(message: str) -> bool:
    """Whether a message is one line, of printable characters and not too long."""
    return bool(message) and message == one_line(message) and len(message) <= MOST_CHARACTERS + 20


def attack(name: str, indices: range, seed: int) -> Iterator[tuple[int, str, str]]:
    """Yields the number, the outcome and what there is to say of each mutated input of a reader."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as root:
        good, work = Path(root, "good"), Path(root, "work")
        good.mkdir()
        reader.write(good)
        shutil.copytree(good, work)
        expected = reader.read(work)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for index in indices:
            shutil.rmtree(work)
            shutil.copytree(good, work)
            changed = mutate(work, reader, random.Random(f"{seed} {name} {index}"))
            outcome, said = attempt(reader, work, expected)
            yield index, outcome, f"{changed}: {said}" if outcome in FAULTS else ""
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > before + MEMORY:
                yield index, "memory", f"{changed}: more than {MEMORY >> 30} GiB"
                return


def child(name: str, start: int, stop: int, seed: int) -> None:
    """Attacks a reader, and prints a line for each input before the next one is tried."""
    logging.getLogger("catversion_jax").addHandler(logging.NullHandler())
    logging.getLogger("catversion_jax").propagate = False
    for result in attack(name, range(start, stop), seed):
        print(json.dumps(result), flush=True)


def in_process(name: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Attacks a reader in a process, and in another one after each crash; returns the outcomes and the faults."""
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    start = 0
    while start < count:
        span = ["--only", name, "--start", str(start), "--count", str(count), "--seed", str(seed)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.attack.fuzz", *span], cwd=ROOT, capture_output=True, text=True
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        for index, outcome, said in lines:
            outcomes[outcome] += 1
            start = index + 1
            if outcome in FAULTS:
                faults.append(f"{name} {index}: {outcome}: {said}")
        if done.returncode:
            outcomes["crashes"] += 1
            faults.append(f"{name} {start}: status {done.returncode}: {done.stderr[-2000:]}")
            start += 1
    outcomes["tried"] = count
    return outcomes, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000, help="inputs, shared among the readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS, help="one reader, in this process")
    parser.add_argument("--start", type=int, default=0, help="number of the first input of --only")
    given = parser.parse_args()
    if given.only:
        child(given.only, given.start, given.count, given.seed)
        return 0
    print(" | ".join(["reader", *OUTCOMES]))
    total: Counter[str] = Counter()
    faults: list[str] = []
    for name in READERS:
        outcomes, found = in_process(name, -(-given.count // len(READERS)), given.seed)
        print(" | ".join([name, *(str(outcomes[outcome]) for outcome in OUTCOMES)]), flush=True)
        total += outcomes
        faults += found
    print(" | ".join(["all", *(str(total[outcome]) for outcome in OUTCOMES)]))
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
