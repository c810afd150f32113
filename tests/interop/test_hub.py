"""Models of the Hugging Face hub, served here by a small server that speaks as the hub does."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest

from latentjax.errors import UserError
from latentjax.interop import hub

CASES = Path(__file__).parents[1] / "fixtures" / "parity"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with whatever is put into its `files`, of the one model owner/model; it lists what was asked for."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            asked.append(path)
            if path.startswith("/api/models/owner/model/revision/"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode())
            if path.startswith("/api/models/owner/model/tree/"):
                return self.answer(200, json.dumps(
                    [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                     for name, content in files.items()]
                ).encode())  # fmt: skip
            name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
            if name in files:
                return self.answer(200, files[name])
            code = "GatedRepo" if path.startswith("/api/models/owner/gated") else "RepoNotFound"
            return self.answer(403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code})

        do_HEAD = do_GET

        def answer(self, status, content, more=()):
            self.send_response(status)
            headers = {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **dict(more)}
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{serving.server_port}"
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *arguments, **settings: original(*arguments, **settings, endpoint=endpoint, cache_dir=tmp_path / "hub"),
    )
    monkeypatch.chdir(tmp_path)
    yield files, asked
    serving.shutdown()
    serving.server_close()
    thread.join()


def test_only_what_is_read_is_fetched(server):
    """Config, weights and tokenizer; neither pickles nor other frameworks' weights, and nothing twice."""
    files, asked = server
    source = CASES / "gpt_neox-latent-c1-r3"
    for name in ("config.json", "model.safetensors"):
        files[name] = (source / name).read_bytes()
    files |= dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "README.md"), b"x" * 10)
    folder = hub.find_folder("owner/model")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not [path for path in asked if path.endswith((".bin", ".h5", ".md"))]
    asked.clear()
    assert hub.find_folder("owner/model") == folder
    assert not [path for path in asked if path.endswith("model.safetensors")]


def test_shards_are_those_of_the_index(server):
    files, _ = server
    files["config.json"] = b"{}"
    files[hub.INDEX] = json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}).encode()
    files |= {f"part-{n}.safetensors": b"1234" for n in (1, 2, 3)} | {"model.safetensors": b"all"}
    folder = hub.find_folder("owner/model")
    assert {path.name for path in folder.glob("*.safetensors")} == {"part-1.safetensors", "part-2.safetensors"}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("owner/none", "no directory owner/none, and the hub has no public model of that name"),
        ("owner/gated", "does not give owner/gated: its owner gives it out on request only"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(server, name, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        hub.find_folder(name)
    assert "\n" not in str(caught.value)


def test_without_a_network_is_one_line(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no directory owner/model, and .* only where the hub can be reached"):
        hub.find_folder("owner/model")


def test_a_directory_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CASES / "llama-vanilla-gqa", tmp_path / "owner" / "model")
    assert hub.find_folder("owner/model") == Path("owner/model")
