"""The store of a service: a folder with SQLite for what was asked and how it went, and files for the rest.

What is in the database was accepted, and outlives a crash; files without a row there are what a crash left, and go.

    jobs.sqlite, .lock, webhook_secret
    incoming/         requests that are being received
    concepts/<id>/    photos/ (masks/, captions), seen/, concept.safetensors, previews/
    pictures/<id>.png
    checkpoints/      the states of the concepts in training
"""

import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.service.requests import (
    CANCELLED,
    DONE,
    PREPARING,
    QUEUED,
    REMOVING,
    TRAINING,
    ConceptRequest,
    PictureRequest,
)
from catversion_jax.utils.errors import UserError, refused
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.locks import lock_file
from catversion_jax.utils.paths import calling, remove_folder

VERSION = 1
KEY_SECONDS = 86400.0
"""How long an Idempotency-Key is remembered."""
WAITING = (QUEUED, PREPARING, TRAINING)

SCHEMA = f"""
CREATE TABLE concepts (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL,
    asked TEXT NOT NULL, created REAL NOT NULL, ended REAL, previewed INTEGER NOT NULL DEFAULT 0,
    outcome TEXT NOT NULL DEFAULT '{{}}');
CREATE INDEX concepts_by_status ON concepts (status, number);
CREATE INDEX concepts_by_owner ON concepts (owner, number);
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL,
    asked TEXT NOT NULL, created REAL NOT NULL, ended REAL, outcome TEXT NOT NULL DEFAULT '{{}}');
CREATE INDEX pictures_by_status ON pictures (status, number);
CREATE INDEX pictures_by_owner ON pictures (owner, number);
CREATE TABLE shown (picture TEXT NOT NULL, concept TEXT NOT NULL);
CREATE INDEX shown_concepts ON shown (concept);
CREATE TABLE keys (
    owner TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, ids TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (owner, key));
CREATE TABLE deliveries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, owner TEXT NOT NULL, concept TEXT NOT NULL,
    url TEXT NOT NULL, body TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL);
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Key:
    """An Idempotency-Key, with the digest of the request that it came with."""

    key: str
    digest: str


@dataclass(frozen=True)
class Accepted:
    """A concept or a picture that was asked for."""

    number: int
    id: str
    owner: str
    status: str
    asked: str
    created: float
    ended: float | None
    outcome: dict[str, Any] = field(default_factory=dict)
    previewed: bool = False

    @classmethod
    def of(cls, found: sqlite3.Row) -> "Accepted":
        return cls(**dict(found) | {"outcome": json.loads(found["outcome"])})

    @property
    def concept(self) -> ConceptRequest:
        return ConceptRequest.model_validate_json(self.asked)

    @property
    def picture(self) -> PictureRequest:
        return PictureRequest.model_validate_json(self.asked)


def new_id() -> str:
    return secrets.token_hex(12)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, so that a power failure leaves no row without its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TooMany(Exception):
    """Somebody has as much in the queue as he may have."""


class Store:
    """An open store. Any thread may use it; each has a connection of its own."""

    def __init__(self, folder: Path):
        """Opens the store, which is made if need be. Raises UserError if another server has it, or if it is none."""
        self.folder = folder
        self.on_end: Callable[[str, str, float], object] = lambda *_: None
        """Told of what ends: the table, the status, and the seconds since it was asked for."""
        with refused(f"{folder}: cannot be written", "choose another --store"):
            for name in ("incoming", "concepts", "pictures"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        self._lock_context = lock_file(folder / ".lock")
        if not self._lock_context.__enter__().take():
            self._lock_context.__exit__(None, None, None)
            raise UserError(f"{folder}: another server is at work here; stop it, or choose another --store")
        self._local = threading.local()
        try:
            version = self.database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self.database.executescript(f"BEGIN IMMEDIATE;{SCHEMA}COMMIT;")
            elif version != VERSION:
                raise UserError(f"{folder}: a store of version {version}; expected {VERSION}; choose another --store")
        except sqlite3.DatabaseError as error:
            self.close()
            raise UserError(f"{folder / 'jobs.sqlite'}: {error}; restore it, or choose another --store") from error
        except UserError:
            self.close()
            raise

    @property
    def database(self) -> sqlite3.Connection:
        """This thread's connection."""
        found = getattr(self._local, "connection", None)
        if found is None:
            # Autocommit: transactions begin and end where `transaction` says.
            found = sqlite3.connect(
                self.folder / "jobs.sqlite", timeout=30, isolation_level=None, check_same_thread=False
            )
            found.row_factory = sqlite3.Row
            # FULL: what was accepted outlives a power failure. secure_delete: what was removed is overwritten.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                found.execute(f"PRAGMA {pragma}")
            self._local.connection = found
        return found

    def close(self) -> None:
        """Closes this thread's connection, and lets another server in. Those of other threads end with them."""
        if (found := getattr(self._local, "connection", None)) is not None:
            found.close()
            del self._local.connection
        self._lock_context.__exit__(None, None, None)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside happens, or nothing does. One inside another is a part of it."""
        database = self.database
        if database.in_transaction:
            yield database
            return
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def hidden(self, text: str) -> str:
        """Returns a message without the store's path on this machine."""
        for folder in {str(self.folder.absolute()), str(self.folder)}:
            text = text.replace(f"{folder}/", "").replace(folder, "the store")
        return text

    # Files.

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def concept_folder(self, concept_id: str) -> Path:
        return self.folder / "concepts" / concept_id

    def concept_file(self, concept_id: str) -> Path:
        return self.concept_folder(concept_id) / concept_file.FILE_NAME

    def load_concept(self, concept_id: str) -> Concept:
        """Returns what a concept learned. Raises UserError, naming its id, for a file that is missing or damaged."""
        path = self.concept_file(concept_id)
        with calling(str(path), f"concept {concept_id}"):
            return concept_file.load(path)

    def picture_file(self, picture_id: str) -> Path:
        return self.folder / "pictures" / f"{picture_id}.png"

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A folder for what is being received; what is left in it at the end is removed."""
        folder = self.folder / "incoming" / new_id()
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def webhook_secret(self) -> bytes:
        path = self.folder / "webhook_secret"
        if not path.exists():
            write_atomically(path, lambda temporary: temporary.write_bytes(secrets.token_bytes(32)))
            path.chmod(0o600)
        return path.read_bytes()

    # Requests.

    def kept(self, owner: str, key: Key | None) -> list[str] | None:
        """Returns the ids that a request with this key was given; None if it is new.

        Raises UserError if another request had the key.
        """
        if key is None:
            return None
        found = self.database.execute("SELECT * FROM keys WHERE owner = ? AND key = ?", (owner, key.key)).fetchone()
        if found is None or found["created"] < time.time() - KEY_SECONDS:
            return None
        if found["digest"] != key.digest:
            raise UserError("Idempotency-Key: another request came with this key; choose a new one for each request")
        return json.loads(found["ids"])

    def add_concept(self, owner: str, asked: ConceptRequest, received: Path, key: Key | None, most: int) -> str:
        """Accepts a concept, whose photos are in the folder `received`; returns its id.

        Of several requests with one key, the first is accepted, and the others get its id. Raises TooMany if `most` of
        this owner wait already.
        """
        concept_id = new_id()
        folder = self.concept_folder(concept_id)
        received.rename(folder)
        sync_folder(folder.parent)
        try:
            with self.transaction() as database:
                if (kept := self.kept(owner, key)) is not None:
                    return kept[0]
                if self.count("concepts", WAITING, owner) >= most:
                    raise TooMany(f"{most} concepts of this token wait or train already; send it when one has ended")
                database.execute(
                    "INSERT INTO concepts (id, owner, status, asked, created) VALUES (?, ?, ?, ?, ?)",
                    (concept_id, owner, QUEUED, asked.model_dump_json(), time.time()),
                )
                self.keep(owner, key, [concept_id])
            return concept_id
        finally:
            if self.concept(concept_id) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def add_pictures(
        self, owner: str, asked: Sequence[tuple[PictureRequest, list[str]]], key: Key | None, most: int
    ) -> list[str]:
        """Accepts pictures, each with warnings; returns their ids.

        Raises TooMany if there would be more than `most` that wait.
        """
        ids = [new_id() for _ in asked]
        with self.transaction() as database:
            if (kept := self.kept(owner, key)) is not None:
                return kept
            if self.count("pictures", [QUEUED], owner) + len(asked) > most:
                raise TooMany(f"more than {most} pictures of this token would wait; send them when some have ended")
            for picture_id, (one, warnings) in zip(ids, asked, strict=True):
                database.execute(
                    "INSERT INTO pictures (id, owner, status, asked, created, outcome) VALUES (?, ?, ?, ?, ?, ?)",
                    (picture_id, owner, QUEUED, one.model_dump_json(), time.time(), json.dumps({"warnings": warnings})),
                )
                shown = [(picture_id, used.id) for used in one.concepts]
                database.executemany("INSERT INTO shown VALUES (?, ?)", shown)
            self.keep(owner, key, ids)
        return ids

    def keep(self, owner: str, key: Key | None, ids: Sequence[str]) -> None:
        if key is not None:
            now = time.time()
            self.database.execute("DELETE FROM keys WHERE created < ?", (now - KEY_SECONDS,))
            row = (owner, key.key, key.digest, json.dumps(list(ids)), now)
            self.database.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)", row)

    # Rows.

    def concept(self, concept_id: str) -> Accepted | None:
        return self.row("concepts", concept_id)

    def picture(self, picture_id: str) -> Accepted | None:
        return self.row("pictures", picture_id)

    def row(self, table: str, row_id: str) -> Accepted | None:
        found = self.database.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,)).fetchone()
        return None if found is None else Accepted.of(found)

    def owned(self, table: str, owner: str, before: int | None, count: int) -> list[Accepted]:
        """Returns the newest rows of an owner, from before a number on."""
        found = self.database.execute(
            f"SELECT * FROM {table} WHERE owner = ? AND status != ? AND number < ? ORDER BY number DESC LIMIT ?",
            (owner, REMOVING, 2**62 if before is None else before, count),
        )
        return list(map(Accepted.of, found))

    def with_status(self, table: str, statuses: Iterable[str], count: int = 2**31) -> list[Accepted]:
        """Returns the oldest rows of these statuses."""
        marks = list(statuses)
        found = self.database.execute(
            f"SELECT * FROM {table} WHERE status IN ({','.join('?' * len(marks))}) ORDER BY number LIMIT ?",
            (*marks, count),
        )
        return list(map(Accepted.of, found))

    def count(self, table: str, statuses: Sequence[str], owner: str | None = None, before: int = 2**62) -> int:
        """Returns how many rows have these statuses: of one owner or of all, with smaller numbers than `before`."""
        marks = ",".join("?" * len(statuses))
        of_owner = "" if owner is None else "AND owner = ?"
        query = f"SELECT COUNT(*) FROM {table} WHERE status IN ({marks}) AND number < ? {of_owner}"
        values = (*statuses, before, *([] if owner is None else [owner]))
        return self.database.execute(query, values).fetchone()[0]

    def ended_since(self, table: str, status: str, since: float) -> int:
        query = f"SELECT COUNT(*) FROM {table} WHERE status = ? AND ended >= ?"
        return self.database.execute(query, (status, since)).fetchone()[0]

    def set_status(self, table: str, row_id: str, status: str, only: Sequence[str] = ()) -> bool:
        """Sets a status, if it is one of `only` now (none: whatever it is); returns whether it was."""
        marks = f"AND status IN ({','.join('?' * len(only))})" if only else ""
        done = self.database.execute(f"UPDATE {table} SET status = ? WHERE id = ? {marks}", (status, row_id, *only))
        return done.rowcount > 0

    def end(self, table: str, row_id: str, status: str, outcome: dict[str, Any]) -> bool:
        """Notes how a concept or a picture ended, unless it was removed meanwhile, and whom to tell of it."""
        with self.transaction() as database:
            row = self.row(table, row_id)
            if row is None or row.status == REMOVING or row.ended is not None:
                return False
            if outcome.get("error"):
                outcome = outcome | {"error": self.hidden(outcome["error"])}
            database.execute(
                f"UPDATE {table} SET status = ?, outcome = ?, ended = ? WHERE id = ?",
                (status, json.dumps(row.outcome | outcome), time.time(), row_id),
            )
            if table == "concepts" and (url := row.concept.webhook_url):
                self.tell(row, status, url, outcome.get("error"))
        self.on_end(table, status, time.time() - row.created)
        return True

    def add_outcome(self, concept_id: str, outcome: dict[str, Any]) -> None:
        """Notes something of a concept that has not ended."""
        with self.transaction() as database:
            if (row := self.concept(concept_id)) is not None:
                values = (json.dumps(row.outcome | outcome), concept_id)
                database.execute("UPDATE concepts SET outcome = ? WHERE id = ?", values)

    def add_preview(self, concept_id: str, step: int, number: int, prompt: str) -> None:
        """Notes a preview that was drawn."""
        with self.transaction():
            if (row := self.concept(concept_id)) is not None:
                drawn = {(old[0], old[1]): old for old in row.outcome.get("previews", [])} | {
                    (step, number): [step, number, prompt]
                }
                self.add_outcome(concept_id, {"previews": sorted(drawn.values())})

    def set_previewed(self, concept_id: str) -> None:
        self.database.execute("UPDATE concepts SET previewed = 1 WHERE id = ?", (concept_id,))

    # Webhooks.

    def tell(self, row: Accepted, status: str, url: str, error: str | None) -> None:
        body = json.dumps({"type": f"concept.{status}", "data": {"id": row.id, "status": status, "error": error}})
        self.database.execute(
            "INSERT INTO deliveries (id, owner, concept, url, body, due) VALUES (?, ?, ?, ?, ?, ?)",
            (f"msg_{new_id()}", row.owner, row.id, url, body, time.time()),
        )

    def deliveries(self, until: float) -> list[sqlite3.Row]:
        return self.database.execute("SELECT * FROM deliveries WHERE due <= ? ORDER BY due", (until,)).fetchall()

    def delivered(self, number: int) -> None:
        self.database.execute("DELETE FROM deliveries WHERE number = ?", (number,))

    def deliver_later(self, number: int, due: float) -> None:
        self.database.execute("UPDATE deliveries SET tries = tries + 1, due = ? WHERE number = ?", (due, number))

    # Removal.

    def remove_concept(self, row: Accepted) -> None:
        """Removes a concept, its photos and the pictures that show it; of one that had not ended, the id stays."""
        remove_folder(self.concept_folder(row.id))  # first: it makes room on a full disk
        shown = self.database.execute("SELECT picture FROM shown WHERE concept = ?", (row.id,)).fetchall()
        with self.transaction() as database:
            for (picture_id,) in shown:
                self.remove_picture(picture_id)
            database.execute("DELETE FROM deliveries WHERE concept = ?", (row.id,))
            database.execute("DELETE FROM keys WHERE owner = ? AND ids LIKE ?", (row.owner, f"%{row.id}%"))
            if row.ended is None:
                emptied = ConceptRequest(class_word="-").model_dump_json()
                database.execute(
                    "UPDATE concepts SET status = ?, asked = ?, outcome = '{}', ended = ? WHERE id = ?",
                    (CANCELLED, emptied, time.time(), row.id),
                )
            else:
                database.execute("DELETE FROM concepts WHERE id = ?", (row.id,))
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the log keeps the old rows for a while

    def remove_picture(self, picture_id: str) -> None:
        with self.transaction() as database:
            database.execute("DELETE FROM shown WHERE picture = ?", (picture_id,))
            database.execute("DELETE FROM pictures WHERE id = ?", (picture_id,))
        # Last: the worker removes one that it writes after this.
        self.picture_file(picture_id).unlink(missing_ok=True)

    # After a crash.

    def recover(self) -> None:
        """Puts everything back in its place after a server that ended in the middle of something."""
        for folder in (self.folder / "incoming").iterdir():
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.folder / "concepts").iterdir():
            if self.concept(folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)
        for path in (self.folder / "pictures").iterdir():
            if path.suffix != ".png" or self.picture(path.stem) is None:
                path.unlink(missing_ok=True)
        with self.transaction() as database:
            database.execute("UPDATE concepts SET status = ? WHERE status IN (?, ?)", (QUEUED, PREPARING, TRAINING))
        for row in self.with_status("pictures", [QUEUED]):
            if self.picture_file(row.id).is_file():
                self.end("pictures", row.id, DONE, {})
        for row in self.with_status("concepts", [QUEUED]):
            if (path := self.concept_file(row.id)).is_file():
                try:
                    steps = self.load_concept(row.id).steps
                except UserError:  # damaged: it is learned again
                    path.unlink()
                else:
                    self.end("concepts", row.id, DONE, {"step": steps})
