"""Interrupts trainings and batches at random moments and resumes them, until all have ended; nothing may be lost.

    python -m tests.attack.kills --count=100

A resumed run must end with the bytes of an uninterrupted one: what was learned, every loss on the way and the images.
SIGKILL, SIGTERM and SIGINT take turns; a batch runs as two processes that share its manifest, of which one is hit.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import tiny
from tests.commands import ENVIRONMENT, ROOT, command

CONCEPTS = ROOT / "catversion_jax" / "concepts"
NAMES = ("teapot", "dog", "owl", "rocket")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = 24
TIMEOUT = 300


def config_flags(changes: dict[str, object]) -> list[str]:
    common = {
        "adapter.length": 2, "train.steps": STEPS, "train.steps_per_dispatch": 1, "checkpoint.every": 2,
        "sample.every": 8, "sample.steps": 2,
        "sample.prompts": "'a photo of {concept} on the beach','a photo of a blue {class_word}'",
    }  # fmt: skip
    return ["--config=configs/mini.py", *(f"--config.{key}={value}" for key, value in (common | changes).items())]


def train_commands(model: Path, run_dir: Path, resume: bool) -> list[list[str]]:
    teapot = CONCEPTS / "teapot"
    changes = {"data.dir": teapot / "train", "data.masks_dir": teapot / "train_masks", "concept.class_word": "teapot"}
    flags = config_flags({"model.path": model, "run_dir": run_dir} | changes)
    return [["train", *flags, *(["--resume"] if resume else [])]]


def batch_commands(model: Path, run_dir: Path, resume: bool) -> list[list[str]]:
    manifest = run_dir.parent / "manifest.jsonl"
    lines = [{"id": name, "dir": str(CONCEPTS / name / "train"), "class_word": name} for name in NAMES]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = config_flags({"model.path": model, "run_dir": run_dir, "batch.slots": 2, "checkpoint.every": 4})
    shares = [f"--process_id={index}" for index in range(2)]
    return [["batch", *flags, f"--manifest={manifest}", "--num_processes=2", share] for share in shares]


def start(arguments: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Waits for a process; returns its status and what it said on standard error."""
    _, said = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


@dataclass
class Kind:
    """A kind of run: its commands, one for each process, and the files that must not differ in the end."""

    commands: Callable[[Path, Path, bool], list[list[str]]]
    results: tuple[str, ...]
    seconds: float = 0.0  # of an uninterrupted run
    kills: int = 0
    problems: list[str] = field(default_factory=list)

    def whole(self, model: Path, run_dir: Path) -> None:
        """Runs without interruption, twice, so that the second one finds everything compiled and is timed."""
        for _ in range(2):
            shutil.rmtree(run_dir, ignore_errors=True)
            begun = time.monotonic()
            for process in [start(arguments) for arguments in self.commands(model, run_dir, False)]:
                status, said = end(process)
                assert status == 0, said
            self.seconds = time.monotonic() - begun

    def attack(self, model: Path, run_dir: Path, rng: random.Random) -> None:
        """Interrupts one run until it ends, at most 12 times; notes every status or message that is not as promised."""
        shutil.rmtree(run_dir, ignore_errors=True)
        for turn in range(12):
            processes = [start(arguments) for arguments in self.commands(model, run_dir, turn > 0)]
            number, victim = rng.choice(SIGNALS), rng.randrange(len(processes))
            time.sleep(rng.uniform(0.05, 1.1) * self.seconds)
            was_running = processes[victim].poll() is None
            processes[victim].send_signal(number)
            self.kills += was_running
            ended = [end(process) for process in processes]
            for index, (status, said) in enumerate(ended):
                # Before the loop takes notice of signals, the system's default ends the process, or Python's does.
                interrupted = {-number, 128 + number} if index == victim else set()
                if status not in {0} | interrupted or "Traceback" in said.replace("KeyboardInterrupt", ""):
                    self.problems.append(
                        f"{number.name} in turn {turn}, process {index}: status {status}: {said[-600:]}"
                    )
            if all(status == 0 for status, _ in ended):
                return
        for process in [start(arguments) for arguments in self.commands(model, run_dir, True)]:
            status, said = end(process)
            if status != 0:
                self.problems.append(f"not resumed: status {status}: {said[-600:]}")

    def compare(self, run_dir: Path, reference: Path) -> None:
        for name in self.results:
            if not (run_dir / name).is_file() or (run_dir / name).read_bytes() != (reference / name).read_bytes():
                self.problems.append(f"{run_dir / name}: not as in {reference}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="signals to send to running processes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    kinds = {
        "train": Kind(train_commands, ("concept.safetensors", "metrics.jsonl", "samples.png")),
        "batch": Kind(batch_commands, tuple(f"{name}/concept.safetensors" for name in NAMES)),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.write(Path(folder) / "tiny")
        for name, kind in kinds.items():
            kind.whole(model, Path(folder) / f"{name}-whole")
            print(f"{name}: {kind.seconds:.1f} s uninterrupted", flush=True)
        runs = 0
        while sum(kind.kills for kind in kinds.values()) < given.count:
            name = ("train", "train", "batch")[runs % 3]
            kind, run_dir = kinds[name], Path(folder) / f"{name}-{runs}"
            kind.attack(model, run_dir, rng)
            kind.compare(run_dir, Path(folder) / f"{name}-whole")
            print(f"{name}: {kind.kills} interrupted, {len(kind.problems)} problems", flush=True)
            if not kind.problems:
                shutil.rmtree(run_dir)
            runs += 1
    problems = [problem for kind in kinds.values() for problem in kind.problems]
    kills = sum(kind.kills for kind in kinds.values())
    print(f"{kills} interruptions in {runs} runs, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
