"""A container's health check, which the Dockerfile's HEALTHCHECK runs: `python -m tinygptv_ds.apps.serve.probe`."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from collections.abc import Sequence

from tinygptv_ds.processes import command_line

_SECONDS = 4.0  # less than the time-out of the check itself, so that the reason is printed


def probe(command: Sequence[str]) -> tuple[bool, str]:
    """Ask a server that runs in this container for its health.

    Args:
        command: the words of the container's first process, e.g., ["tini", "--", "tinygptv-ds", "serve", "/model"].

    Returns:
        Whether the container is healthy, and why: any other command than `serve` is, a server if it is ready.
    """
    words = list(command)
    if "serve" not in words:
        return True, "no server"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_known_args(words[words.index("serve") + 1 :])[0].port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", "/health")
        reply = connection.getresponse()
        return reply.status == 200, str(json.loads(reply.read())["status"])
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer at port {port}: {error}"
    finally:
        connection.close()


def main() -> None:
    """Print the state and exit with 0 (healthy) or 1."""
    healthy, state = probe(command_line(1))
    print(state)
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
