"""The upload of an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from tinygptv_ds.errors import ConfigError, WeightsError


def check_upload(repo: str) -> None:
    """Check before any work that a folder can be uploaded.

    Raises:
        ConfigError: the name is no repository's, or no token is found in HF_TOKEN or where `hf auth login` puts it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {error}") from None
    if get_token() is None:
        raise ConfigError("--push-to-hub: no token of the Hub; run hf auth login, or set HF_TOKEN")


def push_to_hub(folder: Path, repo: str, *, private: bool) -> str:
    """Upload all files of a folder in one commit and return the repository's URL.

    Args:
        folder: the exported folder, which stays where it is.
        repo: USER/NAME or ORGANIZATION/NAME, or NAME for the token's own account; it is created if it does not exist.
        private: whether a repository that is created is private.

    Raises:
        WeightsError: the Hub refuses it or cannot be reached.
    """
    api = HfApi()
    try:
        created = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Upload TinyGPT-V")
    except OfflineModeIsEnabled:
        raise WeightsError(_failed(folder, repo, "HF_HUB_OFFLINE is set; unset it")) from None
    except HfHubHTTPError as error:
        reason = (error.server_message or str(error)).strip().splitlines()[0]
        raise WeightsError(_failed(folder, repo, f"{error.response.status_code} {reason}")) from None
    except (OSError, ValueError) as error:
        raise WeightsError(_failed(folder, repo, str(error) or type(error).__name__)) from None
    return str(created)


def _failed(folder: Path, repo: str, reason: str) -> str:
    return f"{folder} is exported, but not uploaded to {repo}: {reason}. Then: hf upload {repo} {folder}"
