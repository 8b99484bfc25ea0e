"""The Hugging Face hub, or another one at `HF_ENDPOINT`: is a model there to be had, and pushing one to it."""

import os
import sys
from pathlib import Path

from tools.base.errors import UserError
from tools.base.hub import look_at_hub
from tools.base.named import is_hub_id
from tools.base.secrets import redact

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""What of an earlier push goes where the new one has no file of the name: a stale shard would be loaded."""


class NotPushed(RuntimeError):
    """The hub could not be reached or refused the model; the message is one line, without the token."""


def check_in_reach(source: str) -> None:
    """Refuse a model that is neither on this machine nor, as no hub answers, to be downloaded. Raises UserError.

    One that is here is loaded from here alone, where no hub answers.
    """
    if not is_hub_id(source) or not (problem := look_at_hub()):
        return
    import huggingface_hub

    try:
        absent = huggingface_hub.try_to_load_from_cache(source, "config.json") is None
    except ValueError:  # no id that a hub could have
        absent = True
    if absent:
        raise UserError(
            f"model {source!r} is not on this machine, and {problem}; a directory or a .gguf file needs no hub"
        )


def check_push(repository: str) -> None:
    """Refuse, before anything is loaded, a push that cannot work. Raises UserError."""
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    form = f"--push-to-hub {repository!r} is not of the form ORGANISATION/NAME, such as me/SmolLM2-135M-pruned"
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UserError(form) from error
    if repository.count("/") != 1:
        raise UserError(form)
    if huggingface_hub.is_offline_mode():
        raise UserError("--push-to-hub needs the network, but HF_HUB_OFFLINE is set; unset it, or push later")
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(
            "--push-to-hub needs a token that may write: set HF_TOKEN in the environment or in .env, or run: hf auth "
            "login"
        )
    os.environ["HF_TOKEN"] = token  # of a login too, so that `redact` knows it


def push_model(directory: Path, repository: str) -> str:
    """Upload all files of a model's directory; the repository's address.

    A repository that is not there yet is made private: what was public once cannot be taken back. One that is there
    keeps its visibility, and its files but for the weights of an earlier push. Raises NotPushed in one line.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not (directory / "config.json").is_file():
        raise NotPushed(f"{directory} holds no model")
    if not sys.stderr.isatty():
        disable_progress_bars()
    if problem := look_at_hub():
        raise NotPushed(problem)
    hub = huggingface_hub.HfApi(token=huggingface_hub.get_token())
    try:
        url = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=directory,
            delete_patterns=WEIGHTS,
            commit_message="Model pruned with Billhook",
        )
    except KeyboardInterrupt as error:
        raise NotPushed("interrupted") from error
    except Exception as error:  # the hub's client, its HTTP library and its native uploader have classes of their own
        parts = [str(part) or type(part).__name__ for part in (error, error.__cause__) if part]
        raise NotPushed(redact(" ".join(": ".join(parts).split())[:400])) from error
    return str(url)
