"""What a user can get wrong, one class a kind. The command line prints the message alone and exits with code 2."""


class TinyGPTVError(Exception):
    """Something the user has to fix. The message says what is wrong, where, and what to do."""


class ConfigError(TinyGPTVError):
    """A recipe, a DeepSpeed JSON or a command line that cannot be carried out."""


class DataError(TinyGPTVError):
    """A dataset, shard or sample that is missing or unreadable."""


class WeightsError(TinyGPTVError):
    """Weights that are missing, of the wrong shape, or only partly explained."""


class CheckpointError(TinyGPTVError):
    """A training checkpoint that is torn, altered, or of another run."""


class Stopped(Exception):
    """A run that was told to stop by a signal, and that goes on later from what it has saved.

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
