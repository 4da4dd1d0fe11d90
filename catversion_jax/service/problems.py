"""Problems: what a request is answered that cannot be done, as RFC 9457 describes, in one line of ours."""

import sqlite3
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ExceptionHandler

from catversion_jax.service.store import TooMany
from catversion_jax.utils.errors import StorageError, UserError, is_storage_error, one_line, short
from catversion_jax.utils.log import LOGGER

MEDIA_TYPE = "application/problem+json"
RETRY = {HTTPStatus.TOO_MANY_REQUESTS: 1, HTTPStatus.SERVICE_UNAVAILABLE: 5, HTTPStatus.INSUFFICIENT_STORAGE: 30}
"""Status -> seconds after which the same request may do, unless the problem says so itself."""
WHEN_FULL = 15
"""Seconds after which somebody whose queue is full may ask again."""


class Problem(HTTPException):
    """A request that cannot be done, with the status and the line that its sender gets."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None):
        super().__init__(status, one_line(detail))
        self.status = HTTPStatus(status)
        self.retry_after = retry_after if retry_after is not None else RETRY.get(self.status)


def answer(problem: Problem) -> JSONResponse:
    """Returns the response that describes a problem."""
    content = {
        "type": "about:blank",
        "title": problem.status.phrase,
        "status": int(problem.status),
        "detail": problem.detail,
    }
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, int(problem.status), headers, MEDIA_TYPE)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full or broken, or the machine too busy: it may pass."""
    if isinstance(error, sqlite3.OperationalError):
        return any(word in str(error) for word in ("disk", "full", "locked", "unable to open"))
    return is_storage_error(error)


def problem_of(error: BaseException) -> Problem:
    """Returns the problem that an error is to whoever sent the request."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, TooMany):
        return Problem(429, str(error), WHEN_FULL)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return Problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    if isinstance(error, UserError):
        return Problem(422, str(error))
    # FastAPI wraps what is raised while it reads a request.
    if is_full(error.__cause__ if isinstance(error, HTTPException) and error.__cause__ is not None else error):
        return Problem(507, "the server's disk is full or busy; nothing of this request was kept; send it again later")
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail))
    LOGGER.error("%s: %s", type(error).__name__, short(error), exc_info=error)
    return Problem(500, "a bug of this server; its log says more")


def handle_problems(app: FastAPI) -> None:
    """Lets an app answer every error by its problem."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        hidden = request.app.state.service.store.hidden(problem.detail)
        return answer(Problem(problem.status, hidden, problem.retry_after))

    handler: ExceptionHandler = handle
    ours = (Problem, TooMany, UserError, StorageError)
    for kind in (*ours, RequestValidationError, HTTPException, OSError, sqlite3.Error):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, handler)
