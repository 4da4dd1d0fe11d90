"""Requests to other servers, for photos and webhooks: to public addresses alone, over https, and without redirects.

An address is looked up once and then connected to, so that a name cannot lead elsewhere between check and use. An
operator may list addresses of his own network, literally: HOST or HOST:PORT with an IP address.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urlsplit

from catversion_jax.data.images import MAX_FILE_BYTES
from catversion_jax.utils.errors import BUSY_ERRNOS, UserError, short

TIMEOUT = 10.0  # seconds without an answer
FETCHED_WITHIN, POSTED_WITHIN = 60.0, 15.0
"""Seconds that a whole request may take: a server that sends a byte now and then must not hold ours for ever."""
MOST_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
CARRIERS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16")))
"""Networks whose addresses carry addresses of IPv4, private ones too (NAT64, 6to4)."""


def is_address(host: str) -> bool:
    """Whether a host is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_listed_host(parts: SplitResult, hosts: Collection[str]) -> bool:
    """Whether a URL's server is one of a list: HOST is its port 443, HOST:PORT another one."""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    names = {f"{host}:{parts.port or 443}"} | ({host} if parts.port in (None, 443) else set())
    return bool(names & {known.lower() for known in hosts})


def checked_url(url: str, hosts: Collection[str] | None) -> SplitResult:
    """Returns the parts of a URL whose host is one of `hosts` (None: any name). Raises UserError for another."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # which raises ValueError for one that is no number
    except ValueError:
        raise UserError(f"{url}: no URL; expected one that begins with https://") from None
    if parts.scheme != "https" or not host or parts.username is not None or not url.isascii() or not url.isprintable():
        raise UserError(f"{url}: no https:// URL without a user's name; expected one")
    if hosts is None:
        if is_address(host):
            raise UserError(f"{url}: an address; expected a server's name")
    elif not is_listed_host(parts, hosts):
        allowed = ", ".join(sorted(hosts)) or "none"
        raise UserError(
            f"{url}: the server {host} is not on this service's list ({allowed}); upload the photos instead"
        )
    return parts


def address_of(host: str, port: int, listed: bool) -> tuple[str, int]:
    """Looks a host up. Raises UserError for an address that is not public, unless it is `listed` literally."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host}: not found ({short(error)}); try again later") from None
    for *_, address in found:
        ip = ipaddress.ip_address(address[0])
        inside = not ip.is_global or ip.is_multicast or any(ip in network for network in CARRIERS)
        if inside and not (listed and is_address(host)):
            raise UserError(f"{host}: leads to {ip}, which is no public address; give another URL")
    return str(found[0][4][0]), port


class PinnedConnection(http.client.HTTPSConnection):
    """A connection to an address that was looked up before, with the certificate of the server's name."""

    def __init__(self, host: str, address: tuple[str, int]):
        self._address, self._name, self._trusted = address, host, ssl.create_default_context()
        super().__init__(host, address[1], timeout=TIMEOUT, context=self._trusted)

    def connect(self) -> None:
        self.sock = plain = socket.create_connection(self._address, TIMEOUT)
        self.sock = self._trusted.wrap_socket(plain, server_hostname=self._name)

    def abort(self) -> None:
        """Ends the connection from another thread, whose reader then gets an error."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def connection_to(parts: SplitResult, listed: bool, seconds: float) -> Iterator[PinnedConnection]:
    """Gives a connection that lasts at most so long."""
    host = parts.hostname or ""
    connection = PinnedConnection(host, address_of(host, parts.port or 443, listed))
    timer = threading.Timer(seconds, connection.abort)
    timer.daemon = True
    timer.start()
    try:
        yield connection
    finally:
        timer.cancel()
        connection.close()


def path_of(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def fetch_photo(url: str, hosts: Collection[str], write: Callable[[bytes], object]) -> None:
    """Downloads a photo from one of the operator's hosts; redirects are followed to these hosts alone.

    Raises UserError for what is not allowed, not there or out of reach.
    """
    here = url
    for _ in range(MOST_REDIRECTS + 1):
        parts = checked_url(here, hosts)
        data = None
        with connection_to(parts, listed=True, seconds=FETCHED_WITHIN) as connection:
            try:
                connection.request("GET", path_of(parts), headers={"User-Agent": "catversion"})
                answer = connection.getresponse()
                if answer.status not in REDIRECTS:
                    if answer.status != 200:
                        raise UserError(f"{url}: its server answers {answer.status}; correct the URL")
                    data = answer.read(MAX_FILE_BYTES + 1)
                here = answer.headers.get("Location", "")
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in BUSY_ERRNOS:  # this machine's
                    raise
                # Without its cause, which may look like one of our own disk: a timeout, for example.
                raise UserError(f"{url}: not downloaded ({short(error)}); send the request again") from None
        if data is not None:
            if len(data) > MAX_FILE_BYTES:
                raise UserError(f"{url}: more than {MAX_FILE_BYTES // 2**20} MiB; make the photo smaller")
            write(data)
            return
    raise UserError(f"{url}: more than {MOST_REDIRECTS} redirects; give the photo's own URL")


def post(url: str, body: bytes, headers: Mapping[str, str], hosts: Collection[str]) -> int:
    """Posts to a webhook; returns the status of the answer. Redirects are not followed.

    `hosts` are the operator's own, beside which any public server may be named. Raises UserError for another, and for
    one that is out of reach.
    """
    parts = checked_webhook(url, hosts)
    with connection_to(parts, is_listed_host(parts, hosts), POSTED_WITHIN) as connection:
        try:
            connection.request("POST", path_of(parts), body, dict(headers))
            return connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url}: not reached ({short(error)})") from error


def checked_webhook(url: str, hosts: Collection[str]) -> SplitResult:
    """Returns the parts of a webhook's URL. Raises UserError for one that is never posted to."""
    try:
        return checked_url(url, hosts)
    except UserError:
        return checked_url(url, None)
