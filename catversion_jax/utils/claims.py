"""Claims on a folder in a bucket, where there are no locks.

A claim is an object with a number, and who creates the next number holds it; creating is what a bucket does for one of
several alone. The holder writes to its object again every BEAT seconds. Whoever finds a claim waits until it has not
changed for LEASE seconds, and then takes the next number; a holder that was only slow sees that number and stops.
"""

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path

import msgspec

from catversion_jax.utils import records
from catversion_jax.utils.errors import ReportedError, StorageError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, create, entries

BEAT, LEASE = 15.0, 60.0
PATTERN = re.compile(r"\.claim-(?P<name>.+)-(?P<number>\d{6})\.json")
BOOT = Path("/proc/sys/kernel/random/boot_id")
PIDS = "/proc/self/ns/pid"


class ClaimNote(msgspec.Struct, frozen=True):
    """What a claim's object says."""

    owner: str  # a random word of the process
    host: str
    boot: str  # when the host started; pids are its own
    pid: int
    beat: int = 0
    released: bool = False

    @property
    def is_dead(self) -> bool:
        """Whether the holder is a process of this host that has ended; False if that cannot be told."""
        if (self.host, self.boot) != (socket.gethostname(), boot_id()) or self.pid == os.getpid():
            return False
        with contextlib.suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return False


def boot_id() -> str:
    """Returns what tells machines, starts of a machine and containers apart: a pid means something in one of them."""
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    return boot + (os.readlink(PIDS) if os.path.lexists(PIDS) else "")


class Claim:
    """A claim by the name `name` on a folder. `take` and `release` it."""

    def __init__(self, folder: AnyPath, name: str):
        self.folder, self.name = folder, name
        self._note = ClaimNote(secrets.token_hex(8), socket.gethostname(), boot_id(), os.getpid())
        self._number = 0
        self._lost = False
        self._heard = 0.0  # when the claim was last renewed
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> bool:
        """Takes the claim; returns False if somebody else holds it and is alive, which takes up to LEASE to tell."""
        while True:
            number = max(self.numbers(self.name), default=0)
            if number and is_held(self.folder, self.name, number):
                return False
            if create(self._path(number + 1), records.encode(self._note).encode()):
                self._number = number + 1
                if max(self.numbers(self.name)) > self._number:  # while this one was made, others came and went
                    continue
                self._heard = time.monotonic()
                for older in self.numbers(self.name):
                    if older < self._number:
                        self._path(older).unlink(missing_ok=True)
                self._beats.start()
                return True

    def numbers(self, name: str) -> list[int]:
        """Returns the numbers of the claims of a name."""
        return [number for other, number in found_claims(self.folder) if other == name]

    def check(self) -> None:
        """Raises StorageError if another process has taken over."""
        # A process that could not renew its claim for so long may have been taken for a lost one.
        if self._lost or time.monotonic() - self._heard > LEASE:
            raise StorageError(f"{self.folder}: another process has taken over, as this one was not heard of; stopped")

    def release(self) -> None:
        """Gives the claim up. What fails is left to the lease."""
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()
        if self._number and not self._lost:
            with contextlib.suppress(ReportedError):
                self._write(msgspec.structs.replace(self._note, released=True))

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                if max(self.numbers(self.name), default=0) > self._number:
                    self._lost = True
                    return
                self._note = msgspec.structs.replace(self._note, beat=self._note.beat + 1)
                self._write(self._note)
                self._heard = time.monotonic()
            except (ReportedError, OSError) as error:
                warn(f"{self.folder}: the claim on it could not be renewed ({error}); tried again")

    def _write(self, note: ClaimNote) -> None:
        self._path(self._number).write_bytes(records.encode(note).encode())

    def _path(self, number: int) -> AnyPath:
        return claim_path(self.folder, self.name, number)


def claim_path(folder: AnyPath, name: str, number: int) -> AnyPath:
    return folder / f".claim-{name}-{number:06}.json"


def found_claims(folder: AnyPath) -> list[tuple[str, int]]:
    """Returns name and number of every claim on a folder."""
    try:
        names = [path.name for path, is_folder in entries(folder) if not is_folder]
    except FileNotFoundError:
        return []
    matches = map(PATTERN.fullmatch, names)
    return [(match["name"], int(match["number"])) for match in matches if match]


def is_held(folder: AnyPath, name: str, number: int) -> bool:
    """Whether the holder of a claim is alive: its object changes within LEASE seconds."""
    first = read_note(folder, name, number)
    until = time.monotonic() + LEASE
    while first is not None and not first.released and not first.is_dead:
        if time.monotonic() >= until:
            return False
        time.sleep(min(BEAT / 3, max(0.0, until - time.monotonic())))
        now = read_note(folder, name, number)
        if now is not None and now != first and not now.released:
            return True
        first = now if now is None or now.released else first
    return False


def read_note(folder: AnyPath, name: str, number: int) -> ClaimNote | None:
    """Returns what a claim says, None if it is gone."""
    path = claim_path(folder, name, number)
    try:
        return records.read_record(path, ClaimNote, "expected a claim; remove it")
    except (FileNotFoundError, ReportedError):
        if path.exists():
            raise
        return None
