"""The image, compose's services and the health check, as far as they can be tested without a container engine."""

import json
import re
import shlex
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from helpers.commands import check_command

from tinygptv_ds.apps.serve.probe import probe

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with its arguments, lines that go on joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def ignored(path: Path) -> bool:
    """Whether `.dockerignore` keeps a file of this folder out of the build: its last pattern that fits decides."""
    names = [path.relative_to(ROOT).as_posix()]
    names += [parent.as_posix() for parent in path.relative_to(ROOT).parents if parent != Path()]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if (
            pattern
            and not pattern.startswith("#")
            and any(
                fnmatch(name, pattern) or (line.startswith("**/") and fnmatch(Path(name).name, pattern))
                for name in names
            )
        ):
            out = not line.startswith("!")
    return out


def test_stages_of_the_image() -> None:
    names = [match for word, rest in instructions() if word == "FROM" for match in re.findall(r" AS (\S+)", rest)]
    bases = [rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"]
    assert {"torch-cuda", "torch-cpu"} <= set(names)
    assert set(bases) - {"${BASE}", "torch-${VARIANT}"} <= set(names)
    variants = {service["build"]["args"]["VARIANT"] for service in SERVICES.values()}
    assert {f"torch-{variant}" for variant in variants} <= set(names)


def test_every_file_that_is_copied_exists() -> None:
    copies = [shlex.split(rest)[:-1] for word, rest in instructions() if word == "COPY"]
    sources = [source for words in copies for source in words if not source.startswith("--")]
    assert "requirements*.txt" in sources and "." in sources
    for source in sources:
        found = [*ROOT.glob(source)] if source != "." else [ROOT / "pyproject.toml"]
        assert found and not any(map(ignored, found)), source


def test_requirements_that_are_installed_exist() -> None:
    """In a layer before the source's, so that a change of the source does not install them again."""
    install = next(n for n, (word, rest) in enumerate(instructions()) if "pip install -r" in rest)
    named = re.findall(r"-r (\S+)", instructions()[install][1])
    assert len(named) >= 5
    assert all((ROOT / name).is_file() for name in named)
    assert install < instructions().index(("COPY", ". ."))


def test_the_build_sees_what_the_wheel_needs_and_nothing_else() -> None:
    """No weights, data, runs, tests or caches; all that pyproject.toml puts into the wheel."""
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'^"([^"]+)" = "tinygptv_ds/_project', project, flags=re.M)
    assert len(needed) > 20
    for name in (*needed, "pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "tinygptv_ds/cli.py"):
        assert not ignored(ROOT / name), name
    for name in ("weights/a.pth", "data/a.tar", "runs/x/model/m.safetensors", ".git/HEAD", ".venv/bin/python"):
        assert ignored(ROOT / name), name
    for name in ("tests/run.sh", "docs/demo.png", "tinygptv_ds/__pycache__/cli.pyc", "stages/tiny/pretrained/x"):
        assert ignored(ROOT / name), name


def test_the_user_is_not_root_and_the_command_is_ours() -> None:
    last = dict(instructions())
    assert int(last["USER"]) > 0
    assert json.loads(last["ENTRYPOINT"]) == ["tini", "--", "tinygptv-ds"]
    health = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert health == ["python", "-m", "tinygptv_ds.apps.serve.probe"]
    order = [word for word, _ in instructions()]
    assert order.index("USER") < order.index("ENTRYPOINT")


@pytest.mark.parametrize("name", SERVICES)
def test_commands_of_the_services(name: str) -> None:
    command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in SERVICES[name]["command"]]
    check_command(["tinygptv-ds", *command])
    assert command[1] == SERVICES[name]["volumes"][0]["target"]
    port = {"serve": 8000, "demo": 7860}[command[0]]
    assert re.fullmatch(rf"127\.0\.0\.1:\$\{{\w+:-{port}\}}:{port}", SERVICES[name]["ports"][0])
    assert str(port) in dict(instructions())["EXPOSE"].split()


def test_one_server_and_one_page_for_each_kind_of_machine() -> None:
    kinds = {(service["profiles"][0], service["command"][0]) for service in SERVICES.values()}
    assert kinds == {(profile, verb) for profile in ("cpu", "gpu") for verb in ("serve", "demo")}
    assert all(("deploy" in service) == (service["profiles"] == ["gpu"]) for service in SERVICES.values())


class Health(BaseHTTPRequestHandler):
    """A server that is not ready at its first request."""

    asked = 0

    def do_GET(self) -> None:
        Health.asked += 1
        status, state = (503, "loading") if Health.asked == 1 else (200, "ready")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"status": state, "path": self.path}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_the_health_check(port: int) -> None:
    command = ["tini", "--", "tinygptv-ds", "serve", "/model", "--host", "0.0.0.0", f"--port={port}"]
    assert probe(command) == (False, "loading")
    assert probe(command) == (True, "ready")
    assert probe(["tini", "--", "tinygptv-ds", "train", "stage1"]) == (True, "no server")
    healthy, state = probe([*command, "--port", "1"])
    assert not healthy and "no answer at port 1" in state
