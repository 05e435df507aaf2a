"""The server's process: starts the engine's ranks, binds the sockets, handles signals, and shuts everything down."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import uvicorn

from meshwright import launch
from meshwright.errors import InputError, Problem, RunFailed
from meshwright.files import write_atomic
from meshwright.serve.access import Access, read_token
from meshwright.serve.protocols.grpc import grpc_server
from meshwright.serve.protocols.http import http_app
from meshwright.serve.protocols.protocol import MAX_HEAD_BYTES, BoundedProtocol
from meshwright.serve.workers import channel
from meshwright.serve.workers.chat import ChatTemplate, Renderer, read_chat_template
from meshwright.serve.workers.served_model import ServedModel

if TYPE_CHECKING:
    from meshwright.job.sections import ServeSection

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
#: In the folder of a server that has one: the line that it prints when it is ready.
ADDRESSES = "addresses.json"
MAX_CONNECTIONS = 1024


@dataclass(frozen=True)
class Addresses:
    """Where a server listens, as it prints it."""

    model: str
    http: str
    grpc: str
    pid: int


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: `serve` ends HTTP, gRPC and the engine in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ModelServer:
    """HTTP and gRPC for one model on one event loop."""

    def __init__(self, model: ServedModel, renderer: Renderer, access: Access, host: str) -> None:
        self._model = model
        self._host = host
        config = uvicorn.Config(
            http_app(model, renderer, access),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
        )
        self._http = _HttpServer(config)
        self._grpc: grpc.aio.Server = grpc_server(model, access)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, http_port: int, grpc_port: int) -> Addresses:
        """Binds both ports, 0 meaning any free one. Raises InputError for a port that cannot be bound."""
        listener = bind(self._host, http_port)
        shown = f"[{self._host}]" if ":" in self._host else self._host
        try:
            bound = self._grpc.add_insecure_port(f"{shown}:{grpc_port}")
        except RuntimeError as error:
            listener.close()
            what = f"cannot listen on {shown}:{grpc_port}"
            raise InputError(Problem("serve.grpc_port", what, "0 picks a free port")) from error
        await self._grpc.start()
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        while not self._http.started:
            await asyncio.sleep(0.005)
            if self._serving.done():
                self._serving.result()
                raise RunFailed(Problem("serve", "the HTTP server ended while starting"))
        http_port = listener.getsockname()[1]
        return Addresses(self._model.name, f"http://{shown}:{http_port}", f"{shown}:{bound}", os.getpid())

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new requests, gives running ones `grace_seconds` to end, cancels the rest, closes every socket."""
        self._model.drain()
        self._http.should_exit = True  # closes the listening socket and idle connections, waits for the others
        grpc_ended = asyncio.create_task(self._grpc.stop(grace_seconds + 1))
        await self._model.close(grace_seconds)
        await grpc_ended
        if self._serving is not None:
            await self._serving


def bind(host: str, port: int, key: str = "serve.http_port") -> socket.socket:
    """A listening TCP socket. Raises InputError naming `key` for an address that cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not a port"
        raise InputError(Problem(key, f"cannot listen on {host}:{port}: {reason}", "0 picks a free port")) from error


@contextlib.asynccontextmanager
async def engine_processes(
    folder: Path,
    config: ServeSection,
    precision: str,
    private: Path,
    run: Path | None = None,
    on_stop: Callable[[], object] | None = None,
) -> AsyncIterator[tuple[ServedModel, launch.Launch]]:
    """Starts and connects the engine's ranks, and ends them at exit. `on_stop` is called where somebody asks for the
    end by the files in `run`. Raises the errors of opening the model."""
    connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()

    def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if connected.done():
            writer.close()
        else:
            connected.set_result((reader, writer))

    path = private / "engine.sock"
    try:
        listener = await asyncio.start_unix_server(on_connect, path)
    except OSError as error:
        if error.errno is not None:
            raise
        what = f"{private.parent} makes the path of a socket too long ({len(os.fsencode(path))} bytes)"
        raise InputError(Problem("TMPDIR", what, "set it to a shorter folder, such as TMPDIR=/tmp")) from error
    payload = {
        "folder": str(folder.resolve()),
        "name": model_name(folder),
        "socket": str(path),
        "max_batch": config.max_batch,
        "max_len": config.max_len,
        "precision": precision,
    }
    logs, hub = (private, None) if run is None else (run / "logs", run / "hub")
    work = "meshwright.serve.workers.worker:run"
    processes = launch.local(work, payload, config.tp or 1, logs, hub_folder=hub, on_stop=on_stop)
    try:
        ended = asyncio.create_task(_wait_for_end(processes))
        either: set[asyncio.Future[Any]] = {connected, ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        listener.close()
        if not connected.done():
            processes.wait()  # raises the error of the rank that failed
            raise RunFailed(Problem("serve", "the engine ended before it was ready"))
        ended.cancel()
        try:
            model = await ServedModel.connect(*connected.result())
        except channel.ChannelClosed as error:
            await asyncio.to_thread(processes.wait)  # raises the error of the rank that failed
            raise RunFailed(Problem("serve", "the engine ended before it was ready")) from error
        yield model, processes
    finally:
        listener.close()
        await asyncio.to_thread(processes.stop)


def model_name(folder: Path) -> str:
    """The model's name for clients: that of its folder, or of the run for a checkpoint of a run."""
    folder = folder.resolve()
    if folder.name == "model" and folder.parent.name.startswith("step-"):
        return folder.parents[2].name
    return folder.name


async def _wait_for_end(processes: launch.Launch) -> None:
    while processes.poll() == "running":
        await asyncio.sleep(0.02)


async def serve(
    folder: Path,
    config: ServeSection,
    precision: str,
    template: ChatTemplate,
    access: Access,
    predicted: Mapping[str, float],
    run: Path | None,
) -> None:
    """Serves until SIGTERM, SIGINT, SIGHUP or `meshwright stop`. Raises RunFailed if the engine ends by itself."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        private = stack.enter_context(launch.scratch_folder("meshwright-"))
        renderer = await stack.enter_async_context(Renderer(template))
        stopping = asyncio.create_task(stop.wait())
        asked = functools.partial(loop.call_soon_threadsafe, stop.set)
        processes_of_engine = engine_processes(folder, config, precision, private, run, asked)
        opening = asyncio.create_task(stack.enter_async_context(processes_of_engine))
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
            return
        model, processes = opening.result()
        model.metrics.predict(predicted)
        server = ModelServer(model, renderer, access, config.host)
        addresses = await server.start(config.http_port, config.grpc_port)
        engine_lost = asyncio.create_task(model.engine_lost.wait())
        try:
            _announce(addresses, run)
            await asyncio.wait({stopping, engine_lost}, return_when=asyncio.FIRST_COMPLETED)
            failed = engine_lost.done()
        finally:
            if run is not None:
                (run / ADDRESSES).unlink(missing_ok=True)
            await server.stop(GRACE_SECONDS)
            engine_lost.cancel()
            stopping.cancel()
        if failed and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.to_thread(processes.wait, 10)  # raises the error of the rank that failed
            raise RunFailed(Problem("serve", "the engine ended by itself"))


def _announce(addresses: Addresses, run: Path | None) -> None:
    """Prints the addresses, and writes them to a file of `run`. Raises RunFailed where nobody can read them: a server
    that nobody can find would stay."""
    if run is not None:
        write_atomic(run / ADDRESSES, (json.dumps(asdict(addresses)) + "\n").encode())
    try:
        print(json.dumps(asdict(addresses)), flush=True)
    except OSError as error:
        what = f"the addresses cannot be written: {error.strerror or error}"
        raise RunFailed(Problem("stdout", what, "send it to a file, or to a reader that stays for one line")) from error


def main(
    folder: Path | str,
    config: ServeSection,
    *,
    precision: str = "auto",
    predicted: Mapping[str, float] | None = None,
    run: Path | None = None,
) -> None:
    """Serve the model in `folder` until SIGTERM, SIGINT, SIGHUP or `stop`, and return when all processes have ended.

    Prints one JSON line, `{"model", "http", "grpc", "pid"}`, when it is ready. /metrics shows `predicted` beside the
    measured figures. `run` is a folder for logs, the addresses, and the files by which `status`, `logs` and `stop` find
    it. Raises InputError (address, token file, model folder), CannotWork (the model does not fit),
    RunFailed (the engine died, or the line cannot be written).
    """
    folder = Path(folder)
    token = None if config.token_file is None else read_token(Path(config.token_file))
    access = Access(config.host, token)
    if not (folder / "config.json").is_file():
        raise InputError(Problem(str(folder), "not a model folder: it has no config.json"))
    template = read_chat_template(folder)
    for key in ("http_port", "grpc_port"):  # an error now, not after the model is loaded
        bind(config.host, getattr(config, key), f"serve.{key}").close()
    asyncio.run(serve(folder, config, precision, template, access, predicted or {}, run))
