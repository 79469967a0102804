"""Whether the weights are those of the run: the policy's start, the reference, and what was exported."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.models.file_digests import described, exported
from dpo_dist.models.resolve import ModelFolder, resolve
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.run.provenance.parent import parent_run, run_digest
from dpo_dist.runtime.json_files import found_object
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.verify.finding import Finding, examples, value_changes

CARD = "README.md"
OF_POLICY = "training would start from other weights, and end at others"
OF_REFERENCE = "the reference's log-probs are others: the loss, every reward and margin, and so the weights"
OF_EXPORT = "what lies there is not what the run exported, and its held-out figures are not this model's"


def check_models(run: Mapping[str, Any], config: RunConfig, kept: Kept, memory: Path | None) -> Iterator[Finding]:
    """Findings on model.path and reference.path."""
    passport = run["passport"]
    policy = _check("model.path", config.model.path, kept.models.get("policy"), passport["policy_weights"], OF_POLICY,
                    memory)
    yield policy
    if not config.loss.needs_reference:
        return
    is_start = config.reference_path == config.model.path and (
        passport["reference_weights"] == passport["policy_weights"])
    if is_start and "reference" not in kept.models:
        yield Finding(policy.status, "reference", "the policy's starting weights: as model.path",
                      OF_REFERENCE if policy.fails else "")
        return
    yield _check("reference.path", config.reference_path, kept.models.get("reference"), passport["reference_weights"],
                 OF_REFERENCE, memory, bare=config.reference.bare_base)


def _check(key: str, path: str, wanted: dict[str, Any] | None, digest: str, means: str, memory: Path | None,
           bare: bool = False) -> Finding:
    try:
        folder = resolve(path, key, offline=True)
        folder = ModelFolder(folder.base) if bare else folder
        found = described(folder, memory)
    except (UserError, OSError) as error:
        return Finding("missing", key, f"{error} (looked in {Path.cwd()})", means)
    if wanted is None:                                   # nothing is kept of each tensor
        same = _digest(folder, memory) == digest
        return (Finding("same", key, f"{path}: {digest}") if same else
                Finding("changed", key, f"{path}: other weights than {digest}", means))
    tensors = tensor_changes(wanted["tensors"], found["tensors"])
    of_adapter = adapter_changes(wanted["adapter"], found["adapter"])
    settings = [f"config.json: {change}" for change in value_changes(wanted["settings"], found["settings"])]
    if not (tensors or of_adapter or settings):
        return Finding("same", key, f"{path}: {_size(found)}, {digest}")
    details = {"tensors": tensors, "adapter": of_adapter, "settings": settings}
    says = _joined(_of_tensors(tensors, wanted), f"its adapter: {examples(of_adapter)}" if of_adapter else "",
                   examples(settings))
    if not (tensors or of_adapter) and _digest(folder, memory) == digest:
        return Finding("harmless", key, f"{path}: {says}", "the weight files say the same as before", details)
    return Finding("changed", key, f"{path}: {says}", means, details)


def _digest(folder: ModelFolder, memory: Path | None) -> str:
    from dpo_dist.models.digest import folder_digest  # imports torch, which nothing else here needs

    return folder_digest(folder, memory)


def _of_tensors(changes: list[str], wanted: Mapping[str, Any]) -> str:
    return f"{len(changes)} of {len(wanted['tensors'])} tensors: {examples(changes)}" if changes else ""


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _size(found: Mapping[str, Any]) -> str:
    adapter = f" and {len(found['adapter']['tensors'])} of its adapter" if found["adapter"] else ""
    return f"{len(found['tensors'])} tensors{adapter}"


def tensor_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of tensors with other bytes, and of those that are gone or new, or have another shape."""
    out = []
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in now or name not in before:
            out.append(f"{name} is {'gone' if name in before else 'new'}")
        elif before[name] != now[name]:
            was, is_now = (text.rpartition(" ")[0] for text in (before[name], now[name]))
            out.append(name if was == is_now else f"{name} was {was}, is now {is_now}")
    return out


def adapter_changes(before: dict[str, Any] | None, now: dict[str, Any] | None) -> list[str]:
    """What differs between two adapters, or that one is gone or new."""
    if before is None or now is None:
        return [] if before == now else ["it is gone" if now is None else "it is new"]
    return [*tensor_changes(before["tensors"], now["tensors"]), *value_changes(before["settings"], now["settings"])]


def check_exports(run_dir: RunDir, kept: Kept) -> Iterator[Finding]:
    """Findings on <run.dir>/model and <run.dir>/adapter, as far as the run exported them."""
    for folder in (run_dir.model, run_dir.adapter):
        name = f"{folder.name}/"
        if folder.name not in kept.exported:
            if folder.exists():
                yield Finding("told", name, "exported by a version that kept no digests of it",
                              "whether it is as it was exported cannot be said")
            continue
        wanted = kept.exported[folder.name]
        if not folder.is_dir():
            yield Finding("missing", name, f"{folder} is gone", "dpo-dist export writes it again from a checkpoint")
            continue
        try:
            found = exported(folder)
        except UserError as error:
            yield Finding("changed", name, str(error), OF_EXPORT)
            continue
        tensors = tensor_changes(wanted["tensors"], found["tensors"])
        names = [name for name in {**wanted["files"], **found["files"]}
                 if name != CARD and wanted["files"].get(name) != found["files"].get(name)]
        if tensors or names:
            says = _joined(_of_tensors(tensors, wanted), f"files: {examples(names)}" if names else "")
            yield Finding("changed", name, says, OF_EXPORT, {"tensors": tensors, "files": names})
        else:
            yield Finding("same", name, f"{len(found['tensors'])} tensors and {len(wanted['files'])} files as exported")


def check_parent(run: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    """A finding on the run that model.path is an export of, where it is one."""
    wanted = run["passport"].get("parent")
    if wanted is None:
        return
    parent = parent_run(config.model.path)
    says = f"{wanted['run']}, its {wanted['export']}"
    if parent is None:
        yield Finding("told", "parent run", f"{says}: its run.json is gone",
                      "the weights are compared above; where they came from can no longer be told")
        return
    content = found_object(parent.run_json)
    if content is not None and run_digest(content) == wanted["digest"]:
        yield Finding("same", "parent run", f"{says}; dpo-dist verify {parent.path} goes on from there")
    else:
        how = "damaged" if content is None else "another now"
        yield Finding("told", "parent run", f"{says}: its run.json is {how}",
                      "the weights are compared above; that run was made again or edited since")
