"""The ASGI application: all routes behind the door."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from ..engine.model import Model
from . import messages, native, ollama, openai, rerank, responses, slots
from .door import Door, Policy
from .service import Service, Settings

PAGE = Path(__file__).parent / "page.html"


def content_policy(page: str) -> str:
    """The CSP of a page: its own script and style by their hashes, and nothing from elsewhere."""
    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}(?:\s[^>]*)?>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def page_route(shown: bool = True) -> Route:
    """GET /: the page for browsers, a line for others."""
    page = PAGE.read_text(encoding="utf-8") if shown and PAGE.is_file() else None
    headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
               "Cache-Control": "no-cache"}
    if page:
        headers["Content-Security-Policy"] = content_policy(page)

    async def root(request: Request) -> Response:
        if page and "text/html" in request.headers.get("accept", ""):
            return Response(page, media_type="text/html", headers=headers)
        return PlainTextResponse("pybmc is running")

    return Route("/", root)


def make_app(policy: Policy | None = None, service: Service | None = None, page: bool = True) -> Door:
    """The application. Without a service it says that the model loads, until its `service` is set."""
    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        if door.service is not None:
            door.service.close()

    routes = [page_route(page), *openai.ROUTES, *responses.ROUTES, *messages.ROUTES, *ollama.ROUTES,
              *native.ROUTES, *rerank.ROUTES, *slots.ROUTES]
    door = Door(Router(routes, redirect_slashes=False, lifespan=lifespan), policy or Policy(), service)
    return door


def app(model, draft=None, policy: Policy | None = None, threads: int | None = None, **settings) -> Door:
    """The application for a model's file, loaded here: for other ASGI servers.
    settings: those of Settings."""
    opened = Model(model, threads=threads)
    return make_app(policy, Service(opened, draft and Model(draft, threads=threads), Settings(**settings)))
