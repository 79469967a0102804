"""export.push_to_hub: the exported model goes to the Hugging Face hub too. The token comes from `hf auth login` or
HF_TOKEN, and is written nowhere."""
from __future__ import annotations

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal

# of an earlier upload: weights of two models must not stand in one repository
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_push(config: RunConfig) -> None:
    """UserError where the hub will not take the model. Makes the repository, private unless it exists: nothing else
    shows, before a GPU is held for hours, that the login is there and may write."""
    name = config.export.push_to_hub
    if name is None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().auth_check(name, write=True)             # a repository that exists passes without
    except Exception as error:                           # its own kinds, httpx's, the operating system's
        raise UserError(f"export.push_to_hub={name}: the hub does not take it ({_line(error)}); run `hf auth login` or "
                        "set HF_TOKEN, with a token that may write there, or leave export.push_to_hub out") from error


def push_model(config: RunConfig, run_dir: RunDir, terminal: Terminal) -> None:
    """Uploads the exported model in one commit, unless that model is there already. UserError where it fails; the model
    stays where it is."""
    name = config.export.push_to_hub
    if name is None or _is_pushed(run_dir, name):
        return
    from huggingface_hub import HfApi

    folder = run_dir.model if config.export.merged else run_dir.adapter
    terminal.say(f"uploading {folder} to {name}")
    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, delete_patterns=WEIGHTS,
                                       commit_message="A model trained with dpo-dist")
    except Exception as error:
        raise UserError(f"export.push_to_hub={name}: the upload failed ({_line(error)}); nothing is lost: the model is "
                        f"in {folder}, and the same command, or dpo-dist export, uploads it again") from error
    write_json(run_dir.pushed_json, sealed({"repository": name, "commit": str(commit.commit_url)}))
    terminal.say(f"on the hub: {commit.commit_url}")


def _is_pushed(run_dir: RunDir, name: str) -> bool:
    """Whether the model that is exported now was uploaded there; export.py removes the note with the model."""
    return (found_sealed(run_dir.pushed_json) or {}).get("repository") == name


def _line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
