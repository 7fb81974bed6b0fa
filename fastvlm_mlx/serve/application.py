"""The server's routes, and what each of them does: the ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import metrics, page
from .chat_completions import ChatCompletions
from .events import ALWAYS, send_bytes, send_json, to_json
from .exchange import Exchange, Form
from .keys import Keys
from .live import Sessions
from .openapi import document
from .refusal import Refusal, refusal_of
from .responses import Responses
from .security import Guard
from .service import Service

Handle = Callable[[Scope, Receive, Send], Awaitable[None]]


class Endpoint:
    """An ASGI application for a route: a function, of whose exceptions clients get an error object."""

    def __init__(self, service: Service, handle: Handle):
        self._service, self._handle = service, handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say what is wrong."""
        try:
            await self._handle(scope, receive, send)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                self._service.journal.failed(f"{scope['method']} {scope['path']}", error)
            await send_json(send, refusal.to_dict(), refusal.status, refusal.headers)


def application(service: Service, keys: Keys, host: str, port: int, *, with_metrics: bool = False) -> ASGIApp:
    """The application for a server bound to a host and a port, which requests have to be for."""
    chat, sessions = ChatCompletions(service.names), Sessions()
    service.metrics.counters["superseded"] = ("Live frames that a newer one replaced.", lambda: sessions.superseded)

    async def live(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(service, scope, receive, send)
        await exchange.run(exchange.answer_live(chat, sessions))

    gets = _reading(service, with_metrics)
    posts: dict[str, Handle] = {
        "/chat/completions": _asking(service, chat),
        "/responses": _asking(service, Responses(service.names)),
        "/live": live,
    }
    routes = [Route(path, Endpoint(service, handle), methods=["GET"]) for path, handle in gets.items()]
    for path, handle in posts.items():
        routes += [Route(prefix + path, Endpoint(service, handle), methods=["POST"]) for prefix in ("/v1", "")]
    inner = Starlette(routes=routes, exception_handlers={HTTPException: _of_routing})
    inner.router.redirect_slashes = False
    return Guard(inner, keys, host, port)


def _asking(service: Service, form: Form) -> Handle:
    """An endpoint that answers questions in a form."""

    async def ask(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(service, scope, receive, send)
        await exchange.run(exchange.answer(form))

    return ask


def _reading(service: Service, with_metrics: bool) -> dict[str, Handle]:
    """The endpoints that only say something, by path."""

    async def health(scope: Scope, receive: Receive, send: Send) -> None:
        status = "ok" if service.ready else "stopping" if service.stopping else "loading"
        headers = {} if service.ready else {"Retry-After": "1"}
        await send_json(send, {"status": status}, 200 if service.ready else 503, headers)

    async def models(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, {"object": "list", "data": service.names.to_list()})

    async def model(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, service.names.to_dict(scope["path_params"]["name"]))

    async def measured(scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(send, service.metrics.text().encode(), metrics.CONTENT_TYPE)

    async def described(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, document(service.names.served, with_metrics=with_metrics))

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(send, page.page(service.names.served), "text/html; charset=utf-8", headers=page.HEADERS)

    found: dict[str, Handle] = {"/": front, "/health": health, "/openapi.json": described}
    for prefix in ("/v1", ""):
        found |= {f"{prefix}/models": models, f"{prefix}/models/{{name:path}}": model}
    return found | ({"/metrics": measured} if with_metrics else {})


async def _of_routing(request: Request, error: Exception) -> Response:
    """What Starlette says where there is no route, or not with this method, as an error object."""
    assert isinstance(error, HTTPException)  # for which this is
    known = {
        404: ("There is nothing at this path.", "not_found"),
        405: ("The path takes another method.", "bad_method"),
    }
    message, code = known.get(error.status_code, (error.detail, "http_error"))
    refusal = Refusal(error.status_code, message, code=code)
    return Response(
        to_json(refusal.to_dict()), error.status_code, {**ALWAYS, **(error.headers or {})}, "application/json"
    )
