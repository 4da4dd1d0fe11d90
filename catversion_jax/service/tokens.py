"""The token file: who may use a service. It holds no token, but a name and the SHA-256 of a token on each line."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import read_text, write_atomically

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LINE = re.compile(rf"(?P<name>{NAME.pattern}):(?P<digest>[0-9a-f]{{64}})")
EXPECTED = "expected lines NAME:SHA256, as `catversion token NAME --tokens=FILE` writes them"
MOST_BYTES = 2**24


def digest_of_token(token: str) -> str:
    """The digest of a token. A plain hash does: tokens are 256 random bits, which nobody guesses from it."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: Path) -> dict[str, str]:
    """Returns the names by the digests of their tokens. Raises UserError for another file, or an empty one."""
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path, MOST_BYTES, EXPECTED).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(f"{path}:{number}: no name and digest; {EXPECTED}")
        names[match["digest"]] = match["name"]
    if not names:
        raise UserError(f"{path}: no tokens; {EXPECTED}")
    return names


def add_token(path: Path, name: str) -> str:
    """Adds a token for a name to the file, which is made if need be, and returns it: it is told this once.

    One name may have several tokens, so that one can be replaced before it is taken out. Raises UserError for a name
    that cannot be.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r}: no name for a token; expected letters, digits and _ . -, at most 64")
    lines = read_text(path, MOST_BYTES, EXPECTED) if path.exists() else ""
    if lines:
        read_tokens(path)
    token = f"cv_{secrets.token_urlsafe(32)}"
    text = f"{lines}{'' if not lines or lines.endswith(chr(10)) else chr(10)}{name}:{digest_of_token(token)}\n"
    write_atomically(path, partial(write_private, text=text))
    path.chmod(0o600)
    return token


def write_private(path: Path, text: str) -> None:
    os.chmod(path, 0o600)
    path.write_text(text, "utf-8")


def owner_of(names: Mapping[str, str], header: str) -> str | None:
    """Returns whose token an Authorization header holds, None if it is nobody's."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        return None
    digest = digest_of_token(token.strip())
    # Each is compared in the same time, whether it is right or wrong.
    found = [name for own, name in names.items() if hmac.compare_digest(own, digest)]
    return found[0] if found else None
