"""The guard looks at every request before its body is read: who sends it, from where, how often and how much."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catversion_jax.service.limits import Limits
from catversion_jax.service.problems import Problem, answer
from catversion_jax.service.tokens import owner_of

LOCAL = "local"
"""Who everybody is where there are no tokens."""
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
OPEN = ("/", "/page.js", "/page.css", "/healthz", "/readyz", "/docs", "/openapi.json")
"""Paths that take no token: they tell nothing of anybody."""
OPEN_FOLDER = "/static-offline-docs/"
SAFE = ("GET", "HEAD", "OPTIONS")
MOST_SENDERS = 10_000
MOST_JSON_MIB = 1

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)
"""The description's page brings a script inside it; it shows nothing that a client sent."""


class Buckets:
    """How often each sender may ask: `rate` requests a second, and as many at once."""

    def __init__(self, rate: int):
        self._rate = rate
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    def take(self, sender: str) -> bool:
        """Takes one request of a sender's; returns False if he has none left."""
        now = time.monotonic()
        left, then = self._left.pop(sender, (float(self._rate), now))
        left = min(float(self._rate), left + (now - then) * self._rate)
        self._left[sender] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > MOST_SENDERS:
            self._left.popitem(last=False)
        return left >= 1


class Guard:
    """An ASGI middleware; the request's state has its `owner` afterwards."""

    def __init__(self, app: ASGIApp, limits: Limits, names: Mapping[str, str] | None, draining: Callable[[], bool]):
        """`names` are those of the tokens by their digests; None: no tokens, and requests from this machine alone."""
        self._app, self._limits, self._names, self._draining = app, limits, names, draining
        self._buckets = Buckets(limits.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        sending = with_headers(send, scope["path"])
        try:
            scope.setdefault("state", {})["owner"] = self.checked_owner(scope)
        except Problem as problem:
            await answer(problem)(scope, receive, sending)
            return
        await self._app(scope, self.limited(scope, receive), sending)

    def checked_owner(self, scope: Scope) -> str:
        """Returns whose request it is. Raises Problem for one that is not let in."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        owner = LOCAL if self._names is None else owner_of(self._names, headers.get("authorization", ""))
        sender = owner or str((scope.get("client") or ("",))[0])
        if not self._buckets.take(sender):
            raise Problem(429, f"more than {self._limits.requests} requests a second; wait a second")
        if self._names is None:
            refuse_strangers(headers, method)
        elif owner is None and path not in OPEN and not path.startswith(OPEN_FOLDER):
            raise Problem(401, "no token of this service; expected the header Authorization: Bearer TOKEN")
        if self._draining() and method not in SAFE:
            raise Problem(503, "the server is stopping; send the request again in a while")
        size = headers.get("content-length", "0")
        if not size.isdecimal() or len(size) > 15 or int(size) > self.most_mib(scope) * 2**20:
            raise self.too_large(scope)
        return owner or ""

    def most_mib(self, scope: Scope) -> int:
        """Returns the most MiB of a request's body: a form is written to the disk, anything else is parsed at once."""
        kind = dict(scope["headers"]).get(b"content-type", b"")
        return self._limits.upload_mib if kind.lower().startswith(b"multipart/form-data") else MOST_JSON_MIB

    def too_large(self, scope: Scope) -> Problem:
        return Problem(413, f"the request is too large; expected at most {self.most_mib(scope)} MiB")

    def limited(self, scope: Scope, receive: Receive) -> Receive:
        """Returns a `receive` that ends a request which becomes too large without having said so."""
        received, most = 0, self.most_mib(scope) * 2**20

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise self.too_large(scope)
            return message

        return limited_receive


def refuse_strangers(headers: Mapping[str, str], method: str) -> None:
    """Raises Problem for a request that another site's page makes a browser on this machine send."""
    host = headers.get("host", "").lower()
    name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
    # A name of somebody else's may be made to lead here (DNS rebinding).
    if name not in LOOPBACK:
        raise Problem(403, f"Host: {host or 'missing'}; this server is for this machine alone, at http://localhost")
    if method in SAFE:
        return
    origin = headers.get("origin")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or (
        origin is not None and origin.lower() != f"http://{host}"
    ):
        raise Problem(403, "a request of another site's page; use this server's own")


def with_headers(send: Send, path: str) -> Send:
    """Returns a `send` that adds what keeps browsers from doing more with an answer than they should."""
    is_docs = path == "/docs" or path.startswith(OPEN_FOLDER)
    added = {
        b"content-security-policy": (DOCS_POLICY if is_docs else PAGE_POLICY).encode(),
        b"x-content-type-options": b"nosniff",
        b"referrer-policy": b"no-referrer",
        b"cross-origin-resource-policy": b"same-origin",
        **({b"cache-control": b"no-store"} if path.startswith("/v1/") else {}),
    }

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *added.items()]}
        await send(message)

    return send_with
