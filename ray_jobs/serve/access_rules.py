"""ASGI middleware that rejects requests before their body is read: host, bearer token, size."""

import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
"""Paths without a token, for the probes of a cluster."""
_PORT = re.compile(r":\d+$")


class _TooLargeError(Exception):
    """The body of a request exceeds the limit."""


class AccessRules:
    """Answers 400 to a foreign host, 401 without the token, and 413 to large bodies.

    Passes on other requests.

    Args:
        app: The application.
        token: The token; None allows everybody.
        max_bytes: Maximum size of a body.
        is_private: Whether the server listens on loopback. Without a token, it then answers only to
            addresses on loopback: a web page could give its own name the server's address ("DNS
            rebinding") and would be allowed to read the answers.
    """

    def __init__(self, app: Any, token: str | None, max_bytes: int, is_private: bool) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.checks_host = is_private and token is None
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = _PORT.sub("", headers.get(b"host", b"").decode("latin-1"))
        if self.checks_host and host.strip("[]").lower() not in LOOPBACK:
            text = "without --token_file, this server answers only to 127.0.0.1 and localhost"
            await _reject(send, 400, text)
            return
        given = headers.get(b"authorization", b"")
        if (
            self.expected is not None
            and scope["path"] not in OPEN_PATHS
            and not hmac.compare_digest(given, self.expected)
        ):
            text = "this server requires a bearer token"
            await _reject(send, 401, text, [(b"www-authenticate", b"Bearer")])
            return
        too_large = f"the request exceeds --max_request_mb={self.max_bytes / 2**20:g}"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            await _reject(send, 413, too_large)
            return
        num_bytes, is_started = 0, False
        # FastAPI catches what `receive` raises, and sends an answer of its own.

        async def receive_some() -> MutableMapping[str, Any]:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise _TooLargeError
            return message

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal is_started
            if num_bytes > self.max_bytes and not is_started:
                raise _TooLargeError
            is_started = True
            await send(message)

        try:
            await self.app(scope, receive_some, send_on)
        except _TooLargeError:
            if is_started:
                raise
            await _reject(send, 413, too_large)


async def _reject(
    send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    start = [(b"content-type", b"application/json"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    body = json.dumps({"detail": text}).encode()
    await send({"type": "http.response.body", "body": body})
