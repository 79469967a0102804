"""A model's folder, from the hub's cache or the hub. No transformers here, which takes seconds to import."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.hub_commits import commit_of, note


def hub_folder(name: str, key: str, offline: bool, wanted: Sequence[str]) -> Path:
    """The local folder of a hub model, with the files that the patterns in `wanted` name. UserError naming `key`.

    name: owner/model, or owner/model@revision (a branch, tag or commit). Asked again, it is the same commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    model, _, revision = name.partition("@")
    known = commit_of(name)
    try:
        folder = Path(snapshot_download(model, revision=known or revision or None, allow_patterns=list(wanted),
                                        local_files_only=offline))
        note(name, folder.name)
        return folder
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        remedy = "; set run.offline=false to download it" if offline else ""
        if known:
            raise UserError(f"{key}={name} was commit {known} when this run began, which the local hub cache does not "
                            f"hold{remedy if offline else ', nor the hub'}; another run.dir begins anew") from error
        raise UserError(f"{key}={name} is neither a folder nor a model in the local hub cache{remedy}") from error
