"""From settings to a running server: bind, load the model while already answering, serve, drain, stop.

    bind -> /health/live 200 -> model loaded -> /health/ready 200 -> SIGTERM -> drain -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import uvicorn
from starlette.applications import Starlette

from pelton.config import EngineArgs, Environment
from pelton.errors import ConfigError, EngineDeadError
from pelton.server.app import create_app
from pelton.server.backend import Backend
from pelton.server.connection import with_header_deadline
from pelton.server.service import Service
from pelton.server.settings import ServerSettings

Start = Callable[[EngineArgs], Awaitable[Backend]]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE_S = 5  # after the drain, the time for the last bytes to leave


def run_server(args: EngineArgs, settings: ServerSettings, start: Start) -> None:
    """Serve the engine that `start` makes until SIGTERM or Ctrl-C.

    PeltonError if the port is taken, the model cannot be served, or the engine dies for good.
    """
    level = logging.getLevelNamesMapping().get(Environment.read().log_level, logging.INFO)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(args, settings, start))


async def serve(args: EngineArgs, settings: ServerSettings, start: Start) -> None:
    """As run_server, in an event loop."""
    begun = time.monotonic()
    settings = replace(settings, limits=replace(settings.limits, num_logprobs=args.max_logprobs))
    listener = bind(settings)
    app = create_app(None, settings)
    service: Service = app.state.service
    server = _Server(uvicorn_config(app, settings))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loading = asyncio.ensure_future(start(args))
    stopped = asyncio.Event()
    stopping = asyncio.create_task(stopped.wait())
    dead = asyncio.create_task(_engine_death(service))
    with _signals(stopped, server):
        print(f"pelton: loading {args.model}", flush=True)
        try:
            await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                service.attach(loading.result())
                _print_ready(service, settings, listener, time.monotonic() - begun)
                await asyncio.wait({stopping, serving, dead}, return_when=asyncio.FIRST_COMPLETED)
            if dead.done():
                raise EngineDeadError("the engine has died and could not be started again; the log tells why")
        finally:
            stopping.cancel()
            dead.cancel()
            await _stop(service, loading, settings, server)
            await serving


async def _engine_death(service: Service) -> None:
    """Returns when the engine is gone for good; whoever started the server can then start it again."""
    while service.llm is None or service.llm.is_alive or service.draining:
        await asyncio.sleep(0.2)


async def _stop(service: Service, loading: asyncio.Future[Backend], settings: ServerSettings, server: _Server) -> None:
    """Refuse new work, let running work finish, end the rest with an error event, close."""
    service.draining = True
    if service.llm is not None:
        if service.num_active:
            print(f"pelton: draining, up to {settings.drain_s:g} s; press Ctrl-C to stop at once", flush=True)
        drain = asyncio.create_task(service.llm.shutdown(settings.drain_s))
        hurry = asyncio.create_task(server.forced.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
            await service.llm.shutdown(0.0)
        hurry.cancel()
    elif not loading.done():
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    server.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket, before anything slow happens. ConfigError if the address cannot be had."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only where the protocol is named
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; choose another with --host and --port"
        ) from None
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """Where the server is reached."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{settings.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _print_ready(service: Service, settings: ServerSettings, listener: socket.socket, seconds: float) -> None:
    llm, limits = service.backend(), settings.limits
    print(f"pelton: kernels: {llm.info.kernels}", flush=True)
    print(f"pelton: context of {llm.info.max_model_len:,} tokens, KV cache for {llm.info.num_kv_tokens:,}", flush=True)
    keys = "an API key is required" if settings.api_keys else "no API key is required (--api-key sets one)"
    if settings.host in ("127.0.0.1", "::1", "localhost"):
        keys += "; only this machine may connect (--host 0.0.0.0 opens it to others)"
    print(f"pelton: {keys}", flush=True)
    print(f"pelton: limits: body {limits.body_bytes >> 20} MiB, {limits.num_prompts} prompts, n {limits.n}, "
          f"{limits.num_stop} stop strings, {limits.request_s:g} s a request", flush=True)
    print(f"pelton: ready after {seconds:.1f} s: {', '.join(llm.model_names)} at {url_of(settings, listener)}/v1",
          flush=True)


def uvicorn_config(app: Starlette, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn serves the application: HTTP/1.1 by h11, whose header sizes have a limit, and no WebSockets."""
    limits = settings.limits
    config = uvicorn.Config(
        app,
        http=with_header_deadline(limits.header_s),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level=settings.uvicorn_log_level,
        access_log=settings.access_log,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_S,
        h11_max_incomplete_event_size=limits.header_bytes + limits.target_bytes + 4096,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=settings.ssl_cert_reqs,
    )
    if settings.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    return config


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the port first, and a draining server must answer 503."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.forced = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to serve()."""
        yield

    def force(self) -> None:
        """Stop now."""
        self.force_exit = True
        self.forced.set()


@contextlib.contextmanager
def _signals(stopped: asyncio.Event, server: _Server) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C drains, the second one stops at once."""

    def on_signal() -> None:
        if stopped.is_set():
            server.force()
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
