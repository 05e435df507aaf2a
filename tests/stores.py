"""A real S3 server for tests, in a process of its own, and a cable to it that can be cut."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

SECRET = "a-secret-that-nobody-may-see"
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test ends, however it does
"""


class S3Server:
    """moto's server with an empty bucket named "bucket"; `variables` lead any process to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.files().mkdir("bucket")

    @property
    def variables(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "reader",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def lead_here(self, monkeypatch: pytest.MonkeyPatch, port: int | None = None) -> None:
        """Sets this process's variables to lead here, through `port` where it is given."""
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # clients keep the variables that they were made with
        for name, value in self.variables.items():
            monkeypatch.setenv(name, value)
        if port is not None:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the client below s3fs, which tries again itself

    def files(self) -> Any:
        """The server's objects by paths "bucket/name", seen with fsspec alone."""
        import fsspec

        return fsspec.filesystem(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            key="reader",
            secret=SECRET,
            use_listings_cache=False,
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        yield server
    finally:
        server.kill()


class Cable:
    """A port that leads to another. After `cut(n)` it carries n bytes more towards the server, then ends every
    connection and takes none until it is mended."""

    def __init__(self, port: int) -> None:
        self._to, self._left = port, float("inf")
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, after_bytes: int = 0) -> None:
        self._left = after_bytes

    def mend(self) -> None:
        self._left = float("inf")

    @property
    def is_cut(self) -> bool:
        return self._left <= 0

    def close(self) -> None:
        self._listener.close()
        self._end_all()

    def _accept(self) -> None:
        while self._listener.fileno() != -1:
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                if self.is_cut:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    continue
                self._open |= {near, far}
                for pair in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    with self._lock:
                        data = data[: int(min(len(data), self._left))]
                        self._left -= len(data)
                target.sendall(data)
                if self.is_cut:
                    self._end_all()
        for one in (source, target):
            one.close()

    def _end_all(self) -> None:
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
