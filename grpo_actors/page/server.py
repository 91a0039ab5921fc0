"""The server of the page: Starlette on 127.0.0.1, a token in every address, events that say what changed.

Every client with the token may read; there is nothing to write. A page of another origin learns nothing: it cannot guess the
token, and a name that resolves to 127.0.0.1 is refused by its Host header.
"""

import asyncio
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from grpo_actors.errors import ConfigError, DataError, RunError
from grpo_actors.page.document import BOKEH_JS, POLICY, STATIC, ShownRun, live_page, shape_of
from grpo_actors.page.run_reader import RunReader
from grpo_actors.page.sample_filter import SampleFilter
from grpo_actors.process import BACKGROUND_NICE

HOST = "127.0.0.1"
#: Seconds after which an event is sent although nothing changed, so that a connection that is gone is noticed.
PULSE_S = 15.0
#: Random bytes of the token: nobody guesses it.
TOKEN_BYTES = 16
#: Seconds that answers may take to end after Ctrl-C.
ENDING_S = 1

_HEADERS = (
    (b"content-security-policy", POLICY.format(inline="'self' 'unsafe-inline'", script="'self'").encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class Page:
    """The page of some runs: the readers, and who is told when they have something new."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Open the run folders. Raises `RunError` if one is none."""
        self.token = secrets.token_urlsafe(TOKEN_BYTES)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: set[asyncio.Queue[int | None]] = set()
        self.readers = [RunReader(folder, partial(self._tell, run)) for run, folder in enumerate(folders)]

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/", self._page),
            Route("/view", self._view),
            Route("/samples", self._groups),
            Route("/samples/{position:int}", self._group),
            Route("/events", self._events),
            Route("/bokeh.min.js", _file(BOKEH_JS)),
            *(Route(f"/{name}", _file(STATIC / name)) for name in ("page.js", "page.css")),
        ]
        return Starlette(
            routes=[Mount(f"/{self.token}", routes=routes)],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(_Headers),
            ],
            exception_handlers={ConfigError: _refuse, DataError: _refuse},
            lifespan=self._lifespan,
        )

    def end_events(self) -> None:
        """End all streams of events, so that the server can stop."""
        for listener in self._listeners:
            listener.put_nowait(None)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        yield
        self._loop = None

    def _tell(self, run: int) -> None:
        """Tell all listeners of news; called in a reader's thread."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._publish, run)

    def _publish(self, run: int) -> None:
        for listener in self._listeners:
            listener.put_nowait(run)

    async def _page(self, _request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(self._shown, live_page))

    async def _view(self, request: Request) -> Response:
        reader, words = self._reader(request), request.query_params
        bounds = {name: _number(words[name]) for name in ("first", "last") if name in words}
        return JSONResponse(await run_in_threadpool(reader.view, **bounds))

    async def _groups(self, request: Request) -> Response:
        reader, wanted = self._reader(request), SampleFilter.parse(request.query_params)
        return JSONResponse(await run_in_threadpool(reader.groups, wanted))

    async def _group(self, request: Request) -> Response:
        reader = self._reader(request)
        return JSONResponse(await run_in_threadpool(reader.group, request.path_params["position"]))

    async def _events(self, _request: Request) -> Response:
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        """Yield an event for each change of a run, and one for each run at first: it may have changed since the page."""
        queue: asyncio.Queue[int | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            for run in range(len(self.readers)):
                queue.put_nowait(run)
            while True:
                try:
                    run_or_end = await asyncio.wait_for(queue.get(), PULSE_S)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if run_or_end is None:
                    return
                news = {"run": run_or_end, "shape": await run_in_threadpool(self._shown, shape_of)}
                yield f"data: {json.dumps(news)}\n\n"
        finally:
            self._listeners.discard(queue)

    def _shown(self, use: Callable[[Sequence[ShownRun]], str]) -> str:
        """Return what `use` makes of the runs, while none of them changes."""
        locked: list[RunReader] = []
        try:
            for reader in self.readers:
                reader.lock.acquire()
                locked.append(reader)
            return use([ShownRun(reader.name, reader.state) for reader in self.readers])
        finally:
            for reader in locked:
                reader.lock.release()

    def _reader(self, request: Request) -> RunReader:
        word = request.query_params.get("run", "0")
        if not word.isdecimal() or int(word) >= len(self.readers):
            raise HTTPException(404, f"no run {word}")
        return self.readers[int(word)]


def serve(folders: Sequence[Path], port: int, ready: Callable[[str], None]) -> None:
    """Serve the page of some run folders until Ctrl-C.

    Args:
        folders: The run folders.
        port: The port on 127.0.0.1; 0: any free one.
        ready: Called with the address once connections to it are taken.

    Raises:
        RunError: A folder holds no run or cannot be read, or the port is taken.
    """
    with _bound(port) as listening, ExitStack() as opened:
        page = Page(folders)
        ready(f"http://{HOST}:{listening.getsockname()[1]}/{page.token}/")
        # Training comes first. Not earlier, or a browser that `ready` opens would come last too; and before there are
        # threads, which begin with the priority of the one that starts them.
        os.nice(BACKGROUND_NICE)
        for reader in page.readers:
            opened.callback(reader.close)
            reader.start()
        config = uvicorn.Config(
            page.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=ENDING_S
        )
        _Server(config, page).run(sockets=[listening])


class _Server(uvicorn.Server):  # type: ignore[misc]
    """A server that ends its streams of events when it is asked to stop: they never end by themselves."""

    def __init__(self, config: uvicorn.Config, page: Page) -> None:
        super().__init__(config)
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._page.end_events()
        await super().shutdown(sockets)


def _bound(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
    try:
        listening.bind((HOST, port))
        listening.listen()  # another socket may have been bound, too, and listens
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or error
        raise RunError(
            f"--port: {HOST}:{port} cannot be used ({why}); choose another port, or 0 for a free one"
        ) from error
    return listening


class _Headers:
    """Adds the headers that keep the page to itself."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await self._app(scope, receive, with_headers)


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def send(_request: Request) -> Response:
        return FileResponse(path)

    return send


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise ConfigError(f"first and last must be numbers: {error}") from error


async def _refuse(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)
