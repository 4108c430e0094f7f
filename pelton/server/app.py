"""The routes: `create_app(llm, settings)` is the whole HTTP door as one ASGI application."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pelton
from pelton.errors import PeltonError
from pelton.server.backend import Backend
from pelton.server.errors import render
from pelton.server.handlers import chat_completions, completions, detokenize, tokenize
from pelton.server.ingress import Ingress
from pelton.server.service import Service
from pelton.server.settings import ServerSettings


def create_app(llm: Backend | None, settings: ServerSettings) -> Starlette:
    """The application. Without `llm` it answers 503 until `app.state.service.attach(llm)`."""
    middleware = [Middleware(Ingress, settings=settings)]
    if settings.allowed_origins:
        middleware.insert(0, _cors(settings))
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        exception_handlers={PeltonError: _on_error, HTTPException: _on_error, TimeoutError: _on_error},
    )
    app.router.redirect_slashes = False
    app.state.service = Service(settings, llm)
    return app


def _cors(settings: ServerSettings) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
    )


async def _on_error(http: Request, error: Exception) -> Response:
    reply = render(error)
    return JSONResponse(reply.body, reply.status, reply.headers)


async def models(http: Request) -> Response:
    """GET /v1/models: every name of the one model that is served."""
    service: Service = http.app.state.service
    names = service.backend().model_names
    return JSONResponse({"object": "list", "data": [_model_card(service, name) for name in names]})


async def model(http: Request) -> Response:
    """GET /v1/models/NAME"""
    service: Service = http.app.state.service
    return JSONResponse(_model_card(service, service.check_model(http.path_params["name"])))


def _model_card(service: Service, name: str) -> dict[str, Any]:
    llm = service.backend()
    permission = {
        "id": "modelperm-0", "object": "model_permission", "created": service.created, "allow_create_engine": False,
        "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
        "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "vllm",
        "root": llm.model_names[0],
        "parent": None,
        "max_model_len": llm.info.max_model_len,
        "permission": [permission],
    }


async def health(http: Request) -> Response:
    """GET /health, /ping: whether the engine works. No body, as vLLM's."""
    return Response(status_code=200 if http.app.state.service.is_healthy else 503)


async def live(http: Request) -> Response:
    """GET /health/live: 503 if waiting cannot help and the process should be started again."""
    return Response(status_code=200 if http.app.state.service.is_live else 503)


async def ready(http: Request) -> Response:
    """GET /health/ready: whether new requests are taken; red while the model loads and while the server drains."""
    return Response(status_code=200 if http.app.state.service.is_ready else 503)


async def version(http: Request) -> Response:
    """GET /version"""
    return JSONResponse({"version": pelton.__version__})


async def load(http: Request) -> Response:
    """GET /load: generations in flight."""
    return JSONResponse({"server_load": http.app.state.service.num_active})


async def metrics(http: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    return Response(http.app.state.service.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


ROUTES = [
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name:path}", model, methods=["GET"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/ping", health, methods=["GET", "POST"]),
    Route("/health/live", live, methods=["GET"]),
    Route("/health/ready", ready, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
    Route("/load", load, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
