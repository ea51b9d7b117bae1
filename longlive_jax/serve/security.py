"""Who may talk to the studio: the right host name, the same origin, and the token.

A page anywhere on the web can make a browser send requests and open sockets to 127.0.0.1. Three checks
stand in its way, before any handler runs: the Host header must name this server (else a foreign name was
rebound to our address), the Origin must be our own, and what the browser says about the initiator
(Sec-Fetch-Site) must agree.
"""

import hmac
import ipaddress
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longlive_jax.serve.settings import ServeConfig, is_loopback, page_hosts

POLICY_VIOLATION = 1008
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Not "no-referrer": under that, browsers send the door's own form with the origin "null".
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# What a browser without the token may see: the page that asks for it, and its looks.
_OPEN_PATHS = frozenset({"/login", "/static/style.css", "/static/login.css", "/static/icon.svg"})


class Guard:
    """ASGI middleware that refuses everything not meant for this page."""

    def __init__(self, app: ASGIApp, config: ServeConfig, *, cookie: str) -> None:
        self._app, self._config, self._cookie = app, config, cookie
        self._hosts = page_hosts(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None and not self._has_token(headers):
            refusal = self._without_token(scope)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            await refusal(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._is_our_host(host):
            return PlainTextResponse("this server is not reached under that name\n", status_code=421)
        origin = headers.get("origin")
        if origin is not None and not _is_same_origin(origin, host):
            return PlainTextResponse("requests from other sites are refused\n", status_code=403)
        navigates = scope["type"] == "http" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and not (
            navigates and scope["method"] == "GET"
        ):
            return PlainTextResponse("requests from other sites are refused\n", status_code=403)
        return None

    def _is_our_host(self, header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if not name:
            return False
        if name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # A plain address cannot be rebound; on a loopback server only loopback ones are ours.
        return address.is_loopback or not is_loopback(self._config.host)

    def _has_token(self, headers: Headers) -> bool:
        if not self._config.token:
            return True
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        kept = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        return self.is_token(bearer) or self.is_token(kept)

    def is_token(self, text: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(text.encode(), self._config.token.encode())

    def _without_token(self, scope: Scope) -> Response | None:
        if scope["type"] == "websocket":
            return PlainTextResponse("", status_code=401)
        if scope["path"] in _OPEN_PATHS:
            return None
        given = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token", "")
        if scope["path"] == "/" and scope["method"] == "GET" and self.is_token(given):
            return self.welcome()
        if scope["path"] == "/" and scope["method"] == "GET":
            return RedirectResponse("/login", status_code=303)
        return PlainTextResponse("a token is needed\n", status_code=401)

    def welcome(self) -> Response:
        """To the page, with the token in a cookie instead of the address."""
        response = RedirectResponse("/", status_code=303)
        # Lax: a link in a message leads here too; sockets and posts of other sites go without it.
        response.set_cookie(
            self._cookie, self._config.token, httponly=True, samesite="lax", max_age=7 * 86400
        )
        return response


def _is_same_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            if b"cache-control" not in present:
                extra.append((b"cache-control", b"no-store"))
            message["headers"] = [*message["headers"], *extra]
        await send(message)

    return sending
