"""What every request must pass before it is read: the token, and limits of number, size and time."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable

from .errors import Overloaded, RequestError, TooLarge, TooSlow, Unauthorized
from .metrics import Metrics

OPEN = ("/health", "/docs", "/openapi.json")  # need no token


class Gate:
    """
    Wrap an ASGI application so that requests beyond limits do not reach it.

    Args:
        max_concurrent_requests: More at a time are answered with 429.
        max_body_bytes: Larger bodies are answered with 413, and not read.
        body_seconds: How long a body may take to arrive.
        token: What `Authorization: Bearer` must have; None: nothing.
    """

    def __init__(
        self,
        app,
        max_concurrent_requests: int,
        max_body_bytes: int,
        body_seconds: float,
        token: str | None,
        metrics: Metrics,
    ):
        self.app, self.metrics = app, metrics
        self.limit, self.max_body_bytes, self.body_seconds = max_concurrent_requests, max_body_bytes, body_seconds
        self.token, self.running = token, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            self.check_token(scope["path"], headers)
            if scope["method"] != "POST":
                return await self.app(scope, receive, send)
            if self.running >= self.limit:
                raise Overloaded(f"{self.limit:,} requests run already.", 1)
            self.running += 1
            try:
                body = await self.read(headers, receive)
                await self.app(scope, replay(body, receive), send)
            finally:
                self.running -= 1
        except RequestError as error:
            self.metrics.failure.labels(error.kind).inc()
            await respond(error, send)

    def check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise Unauthorized without the token; compared in a time that does not depend on it."""
        if self.token is None or path in OPEN:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            raise Unauthorized("Send the token of this server as `Authorization: Bearer <token>`.")

    async def read(self, headers: dict[bytes, bytes], receive) -> bytes:
        """Return the body of a request, or raise if it is too large or too slow."""
        too_large = TooLarge(f"A request may have {self.max_body_bytes:,} bytes.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise too_large

        async def read() -> bytes:
            body, more = bytearray(), True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > self.max_body_bytes:
                    raise too_large
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.body_seconds)
        except asyncio.TimeoutError:
            raise TooSlow(f"The request did not arrive within {self.body_seconds:g} s.") from None


def replay(body: bytes, receive: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
    """Return a `receive` that gives a body that was read already, and then what comes next."""
    given = False

    async def again() -> dict:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def answer_to(error: RequestError) -> tuple[int, dict[str, str], dict[str, str]]:
    """Return the status, headers and body of the answer to a request that failed."""
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, Overloaded) else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, TooLarge | TooSlow):
        headers["connection"] = "close"  # the rest of the body is not read
    text = str(error)
    return error.status, headers, {"error": text, "error_type": error.kind, "message": text, "detail": text}


async def respond(error: RequestError, send) -> None:
    """Send the answer to a request that failed."""
    status, headers, content = answer_to(error)
    headers["content-type"] = "application/json"
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
