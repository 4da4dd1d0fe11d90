"""The one exception that is a user's mistake and not ours, and how another one is told in a line."""


class UserError(Exception):
    """Printed as one line, without a traceback; the command exits with status 1.

    The message names the file, key or shape, says what was expected and what to do.
    """


def short(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
