"""Warnings, through a logger of our own that no library's settings can mute.

Functions return their warnings where they can; `warn` is for code that runs in threads or deep inside other calls. The
command line prints `catversion: warning: ...`; another program handles them as it has configured its logging.
"""

import logging
from pathlib import Path

from catversion_jax.utils.errors import one_line

LOGGER = logging.getLogger("catversion_jax")
LOGGER.setLevel(logging.WARNING)  # its own: absl changes the root logger's level


def warn(message: str) -> None:
    """Warns the user of a likely mistake, or of a failure that did not stop the work."""
    LOGGER.warning("%s", one_line(message))


def silence(library: str) -> None:
    """Drops what a library logs through absl's logger, which it shares with others that stay heard."""
    logging.getLogger("absl").addFilter(lambda record: library not in Path(record.pathname).parts)
