"""Google Cloud Storage as far as checkpoints use it: one bucket in memory, behind its JSON API, on this machine.

Objects have generations, and writes and deletions that ask for one (`ifGenerationMatch`) fail on any other, as those of
the real service do. TensorStore, which Orbax writes arrays with, relies on that.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class Bucket:
    """Objects by name, each with its generation."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.room: int | None = None  # bytes that there is room for; None: any number
        self.changes_left: int | None = None  # writes and deletions that are not yet refused; None: any number
        self.hidden = ""  # objects with this in their names may not be read
        self.reads: list[tuple[str, int, int]] = []  # of contents: name, first byte, and the one behind the last
        self.lock, self._generation = threading.Lock(), 0

    def write(self, name: str, content: bytes, expected: str | None) -> dict | None:
        """Writes an object whose generation is `expected` (0: there is none; None: any), or returns None."""
        with self.lock:
            if expected is not None and self.objects.get(name, (b"", 0))[1] != int(expected):
                return None
            self._generation += 1
            self.objects[name] = content, self._generation
            return self.metadata(name)

    def size(self, name: str) -> int:
        """Bytes of an object."""
        return len(self.objects[name][0])

    def metadata(self, name: str) -> dict:
        """What the API tells of an object."""
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def may_change(self) -> bool:
        """Whether one more write or deletion is taken; counts it."""
        with self.lock:
            if self.changes_left is None:
                return True
            self.changes_left -= 1
            return self.changes_left >= 0

    def is_full(self, more: int) -> bool:
        """Whether there is no room for so many bytes more."""
        return self.room is not None and sum(len(content) for content, _ in self.objects.values()) + more > self.room


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket
    uploads: dict[str, tuple[str, bytes, str | None]]

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, status: int) -> None:
        self._answer(status, {"error": {"code": status, "message": f"status {status}"}})

    def _request(self) -> tuple[str, dict[str, str], bytes]:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return url.path, {key: values[-1] for key, values in parse_qs(url.query).items()}, body

    def do_GET(self) -> None:
        path, query, _ = self._request()
        name = self._object_of(path)
        if name is None:
            if path.endswith("/o"):
                return self._answer(200, self._listing(query))
            return self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "location": "US"})
        if name not in self.bucket.objects:
            return self._fail(404)
        if self.bucket.hidden and self.bucket.hidden in name:
            return self._fail(403)
        content, generation = self.bucket.objects[name]
        wanted = query.get("generation") or query.get("ifGenerationMatch")
        if wanted is not None and wanted != str(generation):
            return self._fail(412)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._fail(304)
        if query.get("alt") != "media":
            return self._answer(200, self.bucket.metadata(name))
        stamps = {"x_goog_generation": str(generation), "x_goog_stored_content_length": str(len(content))}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            if first >= len(content):
                return self._fail(416)
            last = min(last, len(content) - 1)
            self.bucket.reads.append((name, first, last + 1))
            span = f"bytes {first}-{last}/{len(content)}"
            return self._answer(206, content[first : last + 1], Content_Range=span, **stamps)
        self.bucket.reads.append((name, 0, len(content)))
        return self._answer(200, content, **stamps)

    def do_POST(self) -> None:
        path, query, body = self._request()
        if "upload_id" in query:
            return self._go_on_with(query["upload_id"], body)
        expected = query.get("ifGenerationMatch")
        if found := re.fullmatch(r"/storage/v1/b/[^/]+/o/(.+)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.+)", path):
            source, target = map(unquote, found.groups())
            if source not in self.bucket.objects:
                return self._fail(404)
            if not self.bucket.may_change():
                return self._fail(403)
            resource = self.bucket.write(target, self.bucket.objects[source][0], expected)
            return self._answer(200, {"done": True, "resource": resource})
        kind, name = query.get("uploadType"), query.get("name", "")
        if kind == "resumable":
            place = str(len(self.uploads))
            name = name or json.loads(body)["name"]
            self.uploads[place] = name, b"", expected
            host = self.headers["Host"]
            return self._answer(200, Location=f"http://{host}/upload/storage/v1/b/{BUCKET}/o?upload_id={place}")
        if kind == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + mark)[1:3]]
            name, body = json.loads(parts[0])["name"], re.sub(rb"\r?\n$", b"", parts[1])
        elif kind != "media":
            return self._fail(400)  # something that nobody has asked of it yet
        return self._store(name, body, expected)

    def do_PUT(self) -> None:
        _, query, body = self._request()
        self._go_on_with(query["upload_id"], body)

    def _go_on_with(self, upload: str, body: bytes) -> None:
        """A part of a resumable upload; its last one says how long the whole is."""
        name, before, expected = self.uploads[upload]
        content = before + body
        if (self.headers.get("Content-Range") or "").endswith("/*"):  # more is to come
            self.uploads[upload] = name, content, expected
            return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
        return self._store(name, content, expected)

    def do_DELETE(self) -> None:
        path, query, _ = self._request()
        name, expected = self._object_of(path), query.get("ifGenerationMatch")
        if not self.bucket.may_change():
            return self._fail(403)
        with self.bucket.lock:
            if name not in self.bucket.objects:
                return self._fail(404)
            if expected is not None and expected != str(self.bucket.objects[name][1]):
                return self._fail(412)
            del self.bucket.objects[name]
        return self._answer(204)

    def _store(self, name: str, content: bytes, expected: str | None) -> None:
        if self.bucket.is_full(len(content)) or not self.bucket.may_change():
            return self._fail(403)
        written = self.bucket.write(name, content, expected)
        return self._fail(412) if written is None else self._answer(200, written)

    def _object_of(self, path: str) -> str | None:
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)", path)
        return unquote(found[1]) if found else None

    def _listing(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.bucket.lock:
            for name in sorted(self.bucket.objects):
                low, high = query.get("startOffset", ""), query.get("endOffset")
                if not name.startswith(prefix) or name < low or (high and name >= high):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                else:
                    items.append(self.bucket.metadata(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Says nothing: clients leave as soon as they know enough."""


@contextlib.contextmanager
def served() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """A bucket that answers, and the environment in which `gs://bucket/` means it."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket, "uploads": {}})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    # Which kind of bucket it is, gcsfs would ask another service, again and again.
    environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    try:
        yield bucket, environment
    finally:
        server.shutdown()
        server.server_close()
