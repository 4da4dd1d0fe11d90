"""The one exception that is a user's mistake and not ours."""


class UserError(Exception):
    """Printed as one line, without a traceback; the command exits with status 1.

    The message names the file, key or shape, says what was expected and what to do.
    """
