"""Errors that a user can fix, by kind. The command line prints their message alone and exits with code 2."""


class TinyGPTVError(Exception):
    """An error that the user has to fix. The message names what is wrong, where, and the remedy."""


class ConfigError(TinyGPTVError):
    """A recipe, a DeepSpeed JSON or a command line that is invalid."""


class DataError(TinyGPTVError):
    """A dataset, shard or sample that is missing or unreadable."""


class WeightsError(TinyGPTVError):
    """Weights that are missing, of the wrong shape, or only partly recognised."""


class CheckpointError(TinyGPTVError):
    """A training checkpoint that is incomplete, altered, or of another run."""


class Stopped(Exception):
    """The end of a run that a signal has stopped, and that can be resumed from what it has saved.

    Attributes:
        code: the exit code, 128 + the signal's number: 143 after SIGTERM, 138 after SIGUSR1.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)
