"""Who may come in: hosts, origins and keys; and what leaves: errors, headers, a line in the log, counts."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..errors import BmcError
from .errors import Refused, busy, error_body, invalid, refusal
from .http import Json
from .worker import Gone

log = logging.getLogger("pybmc.serve")

OPEN = {"/health", "/v1/health", "/"}   # need no key
SCHEMES = ("app", "tauri", "vscode-webview")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_HEADER_NAMES = re.compile(r"[\w, -]{0,2000}", re.ASCII)


@dataclass(frozen=True)
class Policy:
    """What the flags allow. hosts and origins: declared ones, besides those that are always fine."""

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_body: int = 8 << 20
    slots: bool = True
    metrics: bool = True
    pull: bool = False


# ---- hosts and origins -------------------------------------------------------------------------------------


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False


def is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return is_address(name) and ipaddress.ip_address(name).is_loopback


def host_allowed(header: str, declared: Sequence[str]) -> bool:
    """Names that a stranger's DNS can point here are not."""
    name = host_name(header)
    known = [host.lower() for host in declared]
    return is_address(name) or is_loopback(name) or name.endswith(".local") or name in known


def origin_allowed(origin: str, host: str, declared: Sequence[str]) -> bool:
    try:
        parts = urlsplit(origin)
        name = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme in SCHEMES or origin in declared:
        return True
    ours = is_loopback(name) or parts.netloc.lower() == host.lower()
    return parts.scheme in ("http", "https") and bool(name) and ours


def path_of(target: str) -> str:
    """The path of a request, whose target may also be a whole URL; a slash at its end changes nothing."""
    if target.startswith(("http://", "https://")):
        target = "/" + target.partition("://")[2].partition("/")[2]
    return target.rstrip("/") or "/"


# ---- the door ----------------------------------------------------------------------------------------------


class Door:
    """The ASGI application around the routes. service: None while the model loads."""

    def __init__(self, routes, policy: Policy, service=None):
        self.routes, self.policy, self.service = routes, policy, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.routes(scope, receive, send)
            return
        await Visit(self, scope, receive, send).run()


class Visit:
    """One request."""

    def __init__(self, door: Door, scope, receive, send):
        self.door, self.policy, self.service = door, door.policy, door.service
        self.scope, self.receive, self._send = scope, receive, send
        self.path = path_of(scope["path"])
        self.scope = scope | {
            "path": self.path, "app": door, "pybmc.service": self.service, "pybmc.policy": self.policy}
        self.request = Request(self.scope, receive)
        told = self.request.headers.get("x-request-id", "")
        self.id = self.scope["pybmc.id"] = told if _REQUEST_ID.fullmatch(told) else secrets.token_hex(8)
        self.origin, self.host = self.request.headers.get("origin"), self.request.headers.get("host", "")
        self.trusted = False            # the origin is one whose pages may read answers
        self.status, self.started = 0, time.perf_counter()

    async def run(self) -> None:
        try:
            self._check_form()
            self._check_places()
            if self.request.method == "OPTIONS" and self.origin:
                await self._answer(Response(status_code=204, headers=self._preflight()))
                return
            if self.service is None:
                raise busy("loading_model", "the model is being loaded")
            self._check_key()
            await self.door.routes(self.scope, self.receive, self.send)
        except Gone:
            self.status = self.status or 499
        except Exception as error:
            await self._fail(error)
        finally:
            self._note()

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            more = ({"x-request-id": self.id} | self._cors()).items()
            coded = [(name.lower().encode(), value.encode("latin-1")) for name, value in more]
            message = message | {"headers": [*message.get("headers", ()), *coded]}
        await self._send(message)

    async def _answer(self, response: Response) -> None:
        await response(self.scope, self.receive, self.send)

    # ---- checks

    def _check_form(self) -> None:
        version = self.scope["http_version"]
        if version not in ("1.0", "1.1", "2", "3"):         # other servers have the later ones
            raise Refused(400, "invalid_http", f"HTTP/{version} is not served here; expected HTTP/1.1",
                          headers={"Connection": "close"})
        if self.scope.get("pybmc.crowded"):
            raise busy("too_many_connections", "the server has as many connections as it takes")
        coding = self.request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise Refused(415, "unsupported_encoding", f"Content-Encoding is {coding!r:.40}; expected none")

    def _check_places(self) -> None:
        if not self.host and self.scope["http_version"] != "1.0":       # which no browser speaks
            raise invalid("Host", "the request has no Host header")
        if self.host and not host_allowed(self.host, self.policy.hosts):
            raise Refused(403, "host_not_allowed",
                          f"the host {self.host!r:.80} is not allowed; --allow-host declares one")
        if self.origin is None:
            if self.request.headers.get("sec-fetch-site") == "cross-site":
                raise Refused(403, "origin_not_allowed", "requests of other sites are not allowed")
        elif not origin_allowed(self.origin, self.host, self.policy.origins):
            raise Refused(403, "origin_not_allowed",
                          f"the origin {self.origin!r:.80} is not allowed; --allow-origin declares one")
        else:
            self.trusted = True

    def _check_key(self) -> None:
        client = self.scope.get("client")
        self.scope["pybmc.client"] = client[0] if client else "local"
        if not self.policy.keys or self.path in OPEN:
            return
        scheme, _, token = self.request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        given = (bearer or self.request.headers.get("x-api-key", "")).encode("utf-8", "replace")
        found = [i for i, key in enumerate(self.policy.keys) if hmac.compare_digest(key.encode(), given)]
        if not found:
            raise Refused(401, "invalid_api_key",
                          "the API key is missing or wrong; expected Authorization: Bearer KEY",
                          headers={"WWW-Authenticate": "Bearer"})
        self.scope["pybmc.client"] = found[0]

    # ---- answers

    def _cors(self) -> dict[str, str]:
        if not self.trusted or self.origin is None:
            return {}
        return {"Access-Control-Allow-Origin": self.origin, "Vary": "Origin",
                "Access-Control-Expose-Headers": "x-request-id, x-pybmc-seed, x-pybmc-schema-ignored"}

    def _preflight(self) -> dict[str, str]:
        asked = self.request.headers.get("access-control-request-headers", "")
        names = asked if _HEADER_NAMES.fullmatch(asked) else ""
        return {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600",
                "Access-Control-Allow-Headers": names or "authorization, content-type, x-api-key"} \
            | ({"Access-Control-Allow-Private-Network": "true"}
               if self.request.headers.get("access-control-request-private-network") == "true" else {})

    async def _fail(self, error: Exception) -> None:
        refused = self._refused(error)
        if self.status:                 # the answer has begun: nothing can be taken back
            log.error("%s: the answer broke off: %s", self.id, refused.code)
            return
        await self._answer(Json(error_body(self.path, refused), refused.status, refused.headers))

    def _refused(self, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, HTTPException):
            allowed = (error.headers or {}).get("Allow", "")
            if error.status_code == 405:
                message = f"{self.request.method} is not allowed here; expected {allowed}"
                return Refused(405, "method_not_allowed", message, headers=dict(error.headers or {}))
            return Refused(404, "no_such_route", f"there is no route {self.path!r:.80}")
        if isinstance(error, BmcError):
            return refusal(error)
        log.error("%s: internal error", self.id, exc_info=error)
        return Refused(500, "internal", f"internal error, logged as {self.id}")

    def _note(self) -> None:
        """The log's line and the count; no text of the request but its method and path."""
        counts = self.scope.get("pybmc.counts")
        told = f" {counts[0]}+{counts[1]} tokens" if counts else ""
        log.info("%s %s %d%s %.3fs %s", self.request.method, ascii(self.path)[1:-1][:200], self.status, told,
                 time.perf_counter() - self.started, self.id)
        if self.service is not None:
            route = getattr(self.scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, self.status).inc()
