"""Webhooks: whoever asked for it is told that a concept ended, signed, and again until it was heard.

The signature is that of standardwebhooks.com: HMAC-SHA256 over `id.timestamp.body`, in base64.
"""

import base64
import hashlib
import hmac
import threading
import time
from collections.abc import Collection
from typing import Any

from catversion_jax.service.outbound import post
from catversion_jax.service.store import Store
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn

FIRST_DELAY = 2.0
"""Seconds until the second try; each further one doubles it."""
MOST_TRIES = 12
"""After the last one, more than an hour after the first, a message is given up."""
PAUSE = 1.0
AT_ONCE, OF_AN_OWNER = 16, 4
"""Messages that are posted at one time: in all, and of one owner."""


def secret_of(store: Store, owner: str) -> bytes:
    """Returns the key that signs an owner's messages: nobody can sign those of another with his own."""
    return hmac.digest(store.webhook_secret, owner.encode(), "sha256")


def secret_text(secret: bytes) -> str:
    """Returns a key as receivers' libraries take it."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def signed(secret: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Returns the headers of a message."""
    digest = hmac.digest(secret, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


class Webhooks(threading.Thread):
    """Delivers the messages of a store, each in a thread of its own, so that none holds others up."""

    def __init__(self, store: Store, hosts: Collection[str]):
        super().__init__(name="webhooks", daemon=True)
        self._store, self._hosts = store, hosts
        self._stopped = threading.Event()
        self._posting: dict[int, str] = {}  # owner by message

    def run(self) -> None:
        while not self._stopped.wait(PAUSE):
            try:
                self.deliver_due()
            # Of a disk that is full, for example: the messages are tried again.
            except Exception as error:
                warn(f"webhooks: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """Starts no further delivery; those that are under way are not waited for, and come again otherwise."""
        self._stopped.set()

    def deliver_due(self) -> None:
        """Posts the messages that are due, a few at a time."""
        for message in self._store.deliveries(time.time()):
            owner, number = message["owner"], message["number"]
            of_owner = sum(other == owner for other in list(self._posting.values()))
            if number not in self._posting and len(self._posting) < AT_ONCE and of_owner < OF_AN_OWNER:
                self._posting[number] = owner
                threading.Thread(target=self.deliver, args=(dict(message),), name="webhook", daemon=True).start()

    def deliver(self, message: dict[str, Any]) -> None:
        """Posts a message, and notes whether it was heard."""
        body, number = message["body"].encode(), message["number"]
        try:
            headers = signed(secret_of(self._store, message["owner"]), message["id"], int(time.time()), body)
            try:
                status = post(message["url"], body, headers, self._hosts)
                problem = "" if 200 <= status < 300 else f"its server answers {status}"
            except UserError as error:
                problem = str(error)
            if not problem:
                self._store.delivered(number)
            elif message["tries"] + 1 >= MOST_TRIES:
                warn(f"webhook of {message['concept']}: given up after {MOST_TRIES} tries: {problem}")
                self._store.delivered(number)
            else:
                self._store.deliver_later(number, time.time() + FIRST_DELAY * 2 ** message["tries"])
        except Exception as error:  # of a full disk: the message is due still
            warn(f"webhook of {message['concept']}: {type(error).__name__}: {error}")
        finally:
            del self._posting[number]
