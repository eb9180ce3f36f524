"""An ASGI guard for the app: it refuses requests from other sites' pages, and sets security headers."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

SHOWN = ("image/png", "image/jpeg", "image/gif", "image/webp")  # files shown inline; others are downloads
HEADERS = {
    b"x-frame-options": b"SAMEORIGIN",
    b"content-security-policy": b"frame-ancestors 'self'",
    b"x-content-type-options": b"nosniff",
}
REFUSED = b"This request comes from a page of another site, and is refused."
CLOSED = b'"close_stream"'  # the last message of an event stream


class Guard:
    """An ASGI layer around the app.

    Args:
        own: names (with ports) of the app other than the request's host.
        left: called with the session of a client whose event stream closes before its end.
    """

    def __init__(self, app: Asgi, own: Callable[[], Iterable[str]], left: Callable[[str], None]) -> None:
        self.app, self.own, self.left = app, own, left

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if is_cross_site(headers, self.own()):
            if scope["type"] == "http":
                await send(
                    {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
                )
                await send({"type": "http.response.body", "body": REFUSED})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        path = str(scope["path"])
        session = session_of(path, scope.get("query_string", b"").decode("latin-1"))
        if session:
            receive, send = self._watched(session, receive, send)
        await self.app(scope, receive, _answering("/file" in path, send))

    def _watched(self, session: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Wrap both to report a client that disconnects before its stream ends."""
        ended = False

        async def listen() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                self.left(session)
            return message

        async def tell(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.body":
                ended = ended or CLOSED in message.get("body", b"") or not message.get("more_body", False)
            await send(message)

        return listen, tell


def is_cross_site(headers: MutableMapping[str, str], own: Iterable[str]) -> bool:
    """Whether a browser sent a request for another site's page; a followed link does not count.

    Programs send no ``Origin``.
    """
    origin = headers.get("origin")
    if origin is None:
        site, mode = headers.get("sec-fetch-site", ""), headers.get("sec-fetch-mode", "")
        return site == "cross-site" and mode != "navigate"
    here = {headers.get("host", ""), *headers.get("x-forwarded-host", "").split(","), *own}
    return urlsplit(origin).netloc not in {_without_port(name.strip()) for name in here if name.strip()}


def _without_port(host: str) -> str:
    """A host as in an ``Origin``, which omits default ports."""
    name, _, port = host.rpartition(":")
    return name if name and port in {"80", "443"} else host


def session_of(path: str, query: str) -> str:
    """The session whose events a request streams; empty for any other request."""
    if path.endswith("/queue/data"):
        return parse_qs(query).get("session_hash", [""])[0]
    *before, event = path.split("/")
    return event if "call" in before else ""


def _answering(file: bool, send: Send) -> Send:
    """Add headers: no other site may frame the app, cookies stay on this site, and files are not executed."""

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message.get("headers", [])]
            headers = [(name, _lax(value) if name == b"set-cookie" else value) for name, value in headers]
            kind = next((value for name, value in headers if name == b"content-type"), b"").decode("latin-1")
            if file and not kind.startswith(SHOWN):
                disposition = next((value for name, value in headers if name == b"content-disposition"), b"attachment")
                headers = [pair for pair in headers if pair[0] not in {b"content-disposition", b"content-type"}]
                headers.append((b"content-disposition", disposition.replace(b"inline", b"attachment", 1)))
                headers.append((b"content-type", b"application/octet-stream"))
            kept = [pair for pair in headers if pair[0] not in HEADERS]
            message = {**message, "headers": [*kept, *HEADERS.items()]}
        await send(message)

    return answer


def _lax(cookie: bytes) -> bytes:
    """A cookie that a browser sends only to the app's own pages."""
    return re.sub(rb"(?i)samesite=none", b"SameSite=lax", cookie)
