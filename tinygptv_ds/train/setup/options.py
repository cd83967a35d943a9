"""A stage's options on their way to the ranks: one word of letters and digits, which no shell changes."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence

from tinygptv_ds.errors import ConfigError

ENCODED = "--encoded-options="


def encode_options(options: Sequence[str], folder: str, env: Mapping[str, str]) -> str:
    """Return one option that represents others.

    Args:
        options: words of a command line, with whatever characters.
        folder: the working directory that they were given in.
        env: environment variables to set in the ranks.
    """
    plain = json.dumps({"options": list(options), "folder": folder, "env": dict(env)})
    return ENCODED + base64.urlsafe_b64encode(plain.encode("ascii")).decode("ascii")


def decode_options(argv: Sequence[str]) -> list[str]:
    """Return a rank's command line with the options that `encode_options` has packed, which come first.

    The working directory and the environment of this process become those that they were given with.

    Raises:
        ConfigError: the working directory does not exist on this host.
    """
    words = []
    for word in argv:
        if not word.startswith(ENCODED):
            words.append(word)
            continue
        plain = json.loads(base64.urlsafe_b64decode(word.removeprefix(ENCODED)))
        words += plain["options"]
        os.environ.update(plain["env"])
        try:
            os.chdir(plain["folder"])
        except OSError as error:
            raise ConfigError(
                f"the working directory {plain['folder']} cannot be entered on this host ({error.strerror}); every "
                "node needs the same paths"
            ) from None
    return words
