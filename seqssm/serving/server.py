"""The web application around the models: the page, the WebSocket, and how the server is."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, Response

import seqssm
from seqssm.serving.client import Client, Limits
from seqssm.serving.engine import Engine, Recogniser, TagEngine
from seqssm.serving.protocol import PCM, Refusal

log = logging.getLogger("seqssm.serving")
SPARE_CONNECTIONS = 16
"""Beside the sessions: clients that have not said hello yet, or are being told that all sessions are in use."""
PATIENCE_S = 5.0
"""That clients have to take their last results when the server stops."""


class Service:
    """Models, limits and clients of a server.

    Args:
        recogniser: with as many slots as ``limits`` has sessions.
        tagger: for live tags, if there are to be any.
        limits: of each client.
        origins: of pages that may connect, such as ``http://localhost:8000``; None for all. Clients that are no
            browsers send none and may connect.
    """

    def __init__(
        self, recogniser: Recogniser, tagger: TagEngine | None, limits: Limits, origins: frozenset[str] | None
    ) -> None:
        self.recogniser, self.tagger, self.limits, self.origins = recogniser, tagger, limits, origins
        self._clients: dict[Client, asyncio.Task[Any] | None] = {}
        self._begin = time.monotonic()
        self._stopping = False

    @property
    def engines(self) -> list[Engine[Any]]:
        return [self.recogniser] if self.tagger is None else [self.recogniser, self.tagger]

    @property
    def failed(self) -> bool:
        """Whether a model has stopped for good."""
        return any(engine.failure is not None for engine in self.engines)

    def about(self) -> dict[str, Any]:
        """The models and limits, for clients."""
        task, limits = self.recogniser.task, self.limits
        return {
            "version": seqssm.__version__,
            "model_rate": task.features.sample_rate,
            "token_ms": round(1000 * task.token_s, 3),
            "chunk_ms": round(1000 * self.recogniser.chunk_s, 3),
            "lookaheads_ms": task.lookahead_ms,
            "default_lookahead_ms": task.lookahead_ms[task.eval_choice],
            "encodings": list(PCM),
            "tagger": None
            if self.tagger is None
            else {"labels": self.tagger.task.labels, "chunk_ms": round(1000 * self.tagger.chunk_s, 3)},
            "limits": {
                "frame_bytes": limits.frame_bytes,
                "session_s": limits.session_s,
                "idle_s": limits.idle_s,
                "ahead_s": limits.ahead_s,
                "speed": limits.speed,
            },
        }

    def health(self) -> dict[str, Any]:
        """Whether the models run, and for how many."""
        feeds = self.recogniser.feeds
        return {
            "status": "failed" if self.failed else "stopping" if self._stopping else "ok",
            "sessions": len(feeds),
            "max_sessions": self.limits.sessions,
            "backlog_s": round(max((f.backlog_s for engine in self.engines for f in engine.feeds), default=0.0), 3),
            "state_bytes_per_session": self.recogniser.table.state_bytes,
            "uptime_s": round(time.monotonic() - self._begin, 3),
            **self.about(),
        }

    def objection(self, origin: str | None) -> tuple[int, str] | None:
        """Status and reason for refusing a connection; None where there is none."""
        if self.origins is not None and origin is not None and origin not in self.origins:
            return 403, f"pages from {origin} may not connect; allow them with --origin {origin}"
        if self._stopping:
            return 503, "the server is stopping"
        if len(self._clients) >= self.limits.sessions + SPARE_CONNECTIONS:
            return 503, f"{len(self._clients)} connections are open; try again later"
        return None

    async def meet(self, socket: WebSocket) -> None:
        """Serve one WebSocket."""
        objection = self.objection(socket.headers.get("origin"))
        if objection is not None:
            status, reason = objection
            log.warning("refused a connection: %s", reason)
            await socket.send_denial_response(JSONResponse({"type": "error", "message": reason}, status))
            return
        await socket.accept()
        client = Client(socket, self)
        self._clients[client] = asyncio.current_task()
        try:
            await client.serve()
        finally:
            del self._clients[client]

    async def stop(self) -> None:
        """End all sessions; their clients get what was heard so far, if they take it soon."""
        self._stopping = True
        tasks = [task for task in self._clients.values() if task is not None]
        for client in list(self._clients):
            client.stop(Refusal("stopping", "the server is stopping; what it has heard is told"))
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)


def make_app(service: Service) -> FastAPI:
    """The application: ``/`` the page, ``/health``, and ``/stream`` the WebSocket of :mod:`seqssm.serving.protocol`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(engine.run()) for engine in service.engines]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The pages that FastAPI makes of itself load scripts from elsewhere.
    app = FastAPI(title="seqssm", version=seqssm.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    page = resources.files("seqssm.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": content_policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse)
    def index() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    def health() -> Response:
        state = service.health()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await service.meet(socket)

    return app


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own script and style, by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies
        )

    return (
        f"default-src 'none'; script-src {hashes('script')} blob:; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Server(uvicorn.Server):
    """Uvicorn, but sessions end with their last results before connections are closed."""

    def __init__(self, service: Service, **options: Any) -> None:
        self._service = service
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                make_app(service),
                lifespan="on",
                log_level="warning",
                # A little more than allowed is read, for an error that says so; far more is cut off by the protocol.
                ws_max_size=4 * limits.frame_bytes,
                ws_per_message_deflate=False,  # PCM hardly shrinks
                # The pong of a client that sends faster than it is read waits behind its sound. Who is gone is found
                # by `idle_s`.
                ws_ping_interval=None,
                timeout_graceful_shutdown=round(PATIENCE_S),
                **options,
            )
        )

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """End the sessions, then the connections."""
        await self._service.stop()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: when asked to, and when a model has failed, so that whoever started it can do so again."""
        return self._service.failed or await super().on_tick(counter)
