"""Uploads to a local stand-in of the Hub's API."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
from helpers.verbs import call

from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.export import export as verb


class _Hub(http.server.BaseHTTPRequestHandler):
    """What `create_repo` and `upload_folder` ask for; every file comes in the commit itself."""

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    private: ClassVar[dict[str, bool]] = {}

    def do_POST(self) -> None:
        body = self._body()
        if self.headers["authorization"] != "Bearer hf_good":
            self._reply({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.repos.setdefault(repo, {})
            self.private[repo] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self._reply({"url": f"http://{self.headers['host']}/{repo}", "name": repo})
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._reply({"files": files})
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.repos[repo] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._reply({"commitUrl": f"http://{self.headers['host']}/{repo}/commit/1", "commitOid": "1" * 40})
        else:
            self._reply({"error": "not here"}, 404)

    def do_GET(self) -> None:
        self._reply({"error": "not here"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    _Hub.repos, _Hub.private = {}, {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        yield _Hub
        server.shutdown()
        thread.join()


def test_an_export_is_uploaded(hub: type[_Hub], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(verb, run, "--out", tmp_path / "out", "--push-to-hub", "me/tiny", "--private")
    here = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.repos["me/tiny"] == here
    assert hub.private["me/tiny"]
    assert "modeling_tinygptv.py" in here
    assert "/me/tiny: uploaded" in capsys.readouterr().out


def test_a_model_is_pushed_with_its_code(hub: type[_Hub], run: Path, tmp_path: Path) -> None:
    call(verb, run, "--out", tmp_path / "out")
    model = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path / "out")
    api = huggingface_hub.HfApi()
    api.create_repo("me/pushed")
    model.save_pretrained(tmp_path / "again")
    api.upload_folder(repo_id="me/pushed", folder_path=tmp_path / "again")
    assert {"config.json", "model.safetensors", "configuration_tinygptv.py", "modeling_tinygptv.py"} <= set(
        hub.repos["me/pushed"]
    )


def test_a_refusal_is_reported(hub: type[_Hub], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder stays, and the message says how to upload it."""
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(WeightsError, match=r"out is exported, but not uploaded to me/tiny: 401 .*hf upload me/tiny"):
        call(verb, run, "--out", tmp_path / "out", "--push-to-hub", "me/tiny")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_offline(hub: type[_Hub], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"not uploaded to me/tiny: HF_HUB_OFFLINE is set"):
        call(verb, run, "--out", tmp_path / "out", "--push-to-hub", "me/tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: "),
        (["--private"], "--private is for --push-to-hub"),
        (["--to", "phi", "--push-to-hub", "me/x"], "--push-to-hub is for --to hf"),
        (["--to", "phi", "--license", "mit"], "--license is for --to hf"),
    ],
)
def test_options_are_checked_first(
    hub: type[_Hub], run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(verb, run, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("tinygptv_ds.weights.export.hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token of the Hub; run hf auth login, or set HF_TOKEN"):
        call(verb, run, "--out", tmp_path / "out", "--push-to-hub", "me/x")
    assert not (tmp_path / "out").exists()
