"""One way to warn: a logger of our own, which no library's settings can mute.

Functions that can do so return their warnings; this is for those that run in threads or deep inside others. The command
line shows them as `catversion: warning: ...`, another program as it has set up its logging.
"""

import logging

LOGGER = logging.getLogger("catversion_jax")


def warn(message: str) -> None:
    """Tells the user something that is likely a mistake, or that went wrong without stopping the work."""
    LOGGER.warning("%s", message)
