"""Google Cloud's notice, from a server that answers as its metadata server does."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from latentjax.training import preemption
from latentjax.training.signals import StopRequest


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What the server is to answer, one after another; what it was asked is appended to the list's second item."""
    answers, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            answer = answers.pop(0)
            self.send_response(200 if answer else 503)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(preemption, "_PAUSE_SECONDS", 0.01)
    yield [answers, asked]
    server.shutdown()
    server.server_close()


def test_the_notice_is_a_request_to_stop(metadata: list, capsys: pytest.CaptureFixture):
    answers, asked = metadata
    answers += [b"FALSE", b"", b"TRUE\n"]  # nothing within the time, a server that restarts, the notice
    stop = StopRequest()
    thread = preemption.watch(stop.notice)
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert stop.requested and stop.exit_status == 143
    assert "Google Cloud takes this machine away: saving and leaving" in capsys.readouterr().err
    assert len(asked) == 3
    assert asked[0][1] == "Google" and asked[0][0].startswith("/computeMetadata/v1/instance/preempted?wait_for_change=")


def test_nobody_is_asked_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption, "_PRODUCT", tmp_path / "product_name")
    assert preemption.watch(lambda reason: None) is None
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert preemption.metadata_server() == "metadata.google.internal"
