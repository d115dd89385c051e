"""Upload an exported folder, with its card, to the Hugging Face Hub.

::

    check_upload("me/my-model")                             # before anything is exported
    address = upload_folder(folder, "me/my-model", private=True)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grass_ray.config import ConfigError


def check_upload(repository: str) -> None:
    """Raise :class:`ConfigError` if a repository's name is none, or nobody is logged in. Sends nothing."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repository}: {error}") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push-to-hub {repository}: the hub is switched off (HF_HUB_OFFLINE)")
    if get_token() is None:
        raise ConfigError(f"--push-to-hub {repository}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def upload_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Make the repository if it is not there, upload the folder, and return its address.

    Raises:
        ConfigError: the hub does not answer, or refuses. The folder is complete, and can be uploaded later.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    failures: tuple[Any, ...] = HfHubHTTPError.__bases__  # those of its client, and OSError: nothing answers
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Upload by grass-ray export")
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder} is written, but the hub did not take it: {reason}; later: hf upload {repository} {folder}"
        ) from None
    return str(made)
