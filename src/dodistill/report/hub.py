"""Upload of a student to the Hugging Face hub: weights, exported files, config and card, in one commit."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DodistillError
from ..files import read_object
from ..models import read_metadata
from .card import model_card
from .front_matter import LICENCE, without_folders

TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Hub:
    """A repository that is to receive a student, and a client with a token. `connect` makes one."""

    repo: str
    private: bool
    api: Any  #: huggingface_hub.HfApi


def connect(repo: str, private: bool = False) -> Hub:
    """Check the name, the library and that there is a token. Nothing is sent.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`; HF_ENDPOINT names another hub. Raises
    DodistillError, with the fix.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise DodistillError(f"--push is {repo!r}; name a repository as OWNER/NAME, as in --push me/digits-student.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise DodistillError(f"--push needs {error.name}: pip install 'dodistill[hub]'") from error
    token = huggingface_hub.get_token()
    if not token:
        raise DodistillError(
            f"--push {repo} needs a token that may write: run `hf auth login`, or set HF_TOKEN; {TOKENS} makes one."
        )
    return Hub(repo, private, huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token))


def content(run: Path, repo: str, files: Mapping[Path, str], licence: str = LICENCE) -> dict[str, bytes]:
    """What is uploaded of a finished run: file name -> content. `files`: exported files -> a sentence on each.

    Folders of this machine are left out of card and config. Raises DodistillError for a folder without a finished run.
    """
    fix = "give the folder of a finished run"
    config = without_folders(read_object(run / "config.json", fix))
    summary = without_folders(read_object(run / "summary.json", fix))
    student = run / "student.safetensors"
    if not student.is_file():
        raise DodistillError(f"{run} holds no student.safetensors; {fix}.")
    said = {path.name: text for path, text in files.items()}
    out = {path.name: path.read_bytes() for path in [student, *files]}
    model = without_folders(read_metadata(student))
    described = {"library_name": "dodistill", "model": model, "distilled": config}
    out["config.json"] = json.dumps(described, indent=1).encode()
    out["README.md"] = model_card(config, summary, repo=repo, files=said, licence=licence).encode()
    return out


def push(hub: Hub, files: Mapping[str, bytes]) -> str:
    """Create the repository if it is not there, and upload `files` in one commit. Returns the address.

    Raises DodistillError when the hub cannot be reached or refuses, and for a public repository where a private one was
    asked for.
    """
    import huggingface_hub

    added: Sequence[Any] = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's advice on metadata
            url = hub.api.create_repo(hub.repo, private=hub.private or None, exist_ok=True)
            if hub.private and not hub.api.repo_info(hub.repo).private:
                raise DodistillError(
                    f"{hub.repo} is there already and is public, but --private was given; nothing was uploaded. Make "
                    "it private on the hub, or choose another name."
                )
            hub.api.create_commit(hub.repo, added, commit_message="Student distilled with dodistill")
    except DodistillError:
        raise
    except Exception as error:  # the library raises its own, those of its HTTP client, and those of its reader
        raise DodistillError(_explained(hub, error)) from error
    return str(url)


def _explained(hub: Hub, error: Exception) -> str:
    """Why the hub refused, and the fix."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    endpoint, again = hub.api.endpoint, "Your files are unchanged; rerun the command."
    if status == 401:
        return (
            f"{endpoint} does not accept the token: run `hf auth login` again, or correct HF_TOKEN ({TOKENS}). {again}"
        )
    if status == 403:
        return (
            f"the token may not write to {hub.repo} ({said}): give it the write right ({TOKENS}), or choose an OWNER "
            f"that is yours. {again}"
        )
    if status is not None:
        return f"{endpoint} refused the upload to {hub.repo} with status {status}: {said} {again}"
    return (
        f"the upload to {hub.repo} failed, {endpoint} cannot be reached ({type(error).__name__}: {said}): check the "
        f"network and HF_ENDPOINT. {again}"
    )
