"""`serve` and `demo` from the command line: what is wrong shows early, and a server starts and ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from helpers import verbs
from helpers.patience import PATIENCE
from test_user_errors import ROOT, cli, one_error, python

from tinygptv_ds.apps.demo import demo
from tinygptv_ds.apps.serve import serve
from tinygptv_ds.errors import ConfigError, TinyGPTVError

VERBS = {"serve": serve, "demo": demo}


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    done = cli(verb, "--help")
    assert done.returncode == 0 and "--port" in done.stdout and "--temperature" in done.stdout, done.stderr


@pytest.mark.parametrize(("verb", "package"), [("serve", "uvicorn"), ("demo", "gradio")])
def test_a_package_that_is_missing(verb: str, package: str) -> None:
    code = f"sys.modules[{package!r}] = None; runpy.run_module('tinygptv_ds', run_name='__main__', alter_sys=True)"
    message = one_error(python(code, verb, "model"))
    assert f"{package}, not installed here: pip install -r requirements-app.txt" in message


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], "nowhere"),
        ([".", "--port", "70000"], "--port must be from 1 to 65535"),
        ([".", "--template", "D"], "--template must be one of training, benchmark, A, B, C, or"),
        ([".", "--temperature", "-1"], "temperature must be in 0"),
    ],
)
def test_options_that_are_wrong(verb: str, options: list[str], words: str) -> None:
    with pytest.raises(TinyGPTVError, match=words):
        verbs.call(VERBS[verb], *options)


def test_limits_that_are_wrong() -> None:
    with pytest.raises(ConfigError, match="--max-megapixels must be at least 1"):
        verbs.call(serve, ".", "--max-megapixels", "0")
    with pytest.raises(ConfigError, match="--max-waiting must be at least 0"):
        verbs.call(serve, ".", "--max-waiting", "-1")


@pytest.mark.parametrize("verb", VERBS)
def test_a_port_that_is_taken(verb: str) -> None:
    """It is noticed before the model is loaded, and without torch."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} is not available (" in one_error(cli(verb, ".", "--port", port))


def test_a_server_from_start_to_end(exported: Path) -> None:
    """Asked with its key and shown prompts, then ended as service managers end it, which is no failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--model-name", "mine", "--dtype", "fp32", "--max-new-tokens", "3", "--show-prompt"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tinygptv_ds", "serve", str(exported), *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, serve.KEY_VARIABLE: "secret"},
    )
    try:
        assert server.stdout.readline() == f"mine, template training, at http://127.0.0.1:{port}/v1\n"
        messages = [{"role": "user", "content": "why?"}]
        for key in ("secret", "wrong"):
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=2) as client:
                if key == "wrong":
                    with pytest.raises(openai.AuthenticationError):
                        client.chat.completions.create(model="mine", messages=messages)
                    continue
                reply = client.chat.completions.create(model="mine", messages=messages)
                assert reply.usage.completion_tokens == 3
        assert "'[INST] why? [/INST]'" in server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    finally:
        server.kill()
        server.stdout.close()
