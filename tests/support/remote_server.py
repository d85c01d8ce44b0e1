"""A web server of one folder that gives ranges, and that fails when it is told to: 503, connections that are cut."""

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FolderServer:
    """Serves `folder` at `url`. `fail` holds what the next requests for bytes answer: 503, or "cut" after half."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fail: list[object] = []
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = server.folder / self.path.split("?")[0].lstrip("/")
                server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
                failure = server.fail.pop(0) if server.fail and self.command == "GET" else None
                if failure == 503 or not (path.is_file() or path.is_dir()):
                    self.send_response(503 if failure == 503 else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if path.is_dir():
                    names = [f"{child.name}/" if child.is_dir() else child.name for child in sorted(path.iterdir())]
                    data = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
                else:
                    data = path.read_bytes()
                size = len(data)
                match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if match:
                    end = int(match[2]) + 1 if match[2] else size
                    data = data[int(match[1]) : end]
                self.send_response(206 if match else 200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Type", "text/html" if path.is_dir() else "application/octet-stream")
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
                if match:
                    self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(data) - 1}/{size}")
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)
                if failure == "cut":
                    self.close_connection = True
                    self.connection.close()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[FolderServer]:
    """A server that ends with the block."""
    server = FolderServer(folder)
    try:
        yield server
    finally:
        server.close()
