"""Whether tokenizer and chat template are those of the run; else which file, key and byte is another."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.templates import PLAIN, is_jinja, template_texts
from dpo_dist.models.file_digests import digest_of, tokenizer_files
from dpo_dist.models.resolve import resolve
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.runtime.files import sha256
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.without_torch import torch_hidden
from dpo_dist.verify.finding import SHOWN, examples, text_change, value_changes
from dpo_dist.verify.pairs import BOTH, Change


def text_changes(run_dir: RunDir, run: Mapping[str, Any], config: RunConfig, kept: Kept) -> Iterator[Change]:
    """Of the tokenizer's files, and of the chat template."""
    recorded = run["passport"].get("tokenizer")
    if recorded is None:
        yield Change("tokenizer", BOTH, "no digests were kept", became="unrecorded")
        return
    try:
        folder = resolve(config.model.path, "model.path", offline=True).tokenizer
        found = tokenizer_files(folder)
    except (UserError, OSError) as error:
        yield Change("tokenizer", BOTH, str(error), became="missing")
        return
    names = [name for name in {**recorded["files"], **found} if recorded["files"].get(name) != found.get(name)]
    if names:
        said = [_of_file(name, recorded["files"], found, folder, run_dir) for name in names]
        yield Change("tokenizer", BOTH, examples(said), became="changed", details={"files": names})
    elif found:
        yield Change("tokenizer", BOTH, f"{len(found)} files, {recorded['digest']}")
    yield from _template(run["passport"]["templates"], config, kept, folder, bool(names))


def _of_file(name: str, before: Mapping[str, str], now: Mapping[str, str], folder: Path, run_dir: RunDir) -> str:
    """What became of a file. Its content then is known where the export still holds it."""
    if name not in now or name not in before:
        return f"{name} is {'gone' if name in before else 'new'}"
    copies = [place / name for place in (run_dir.model, run_dir.adapter) if (place / name).is_file()]
    then = next((copy for copy in copies if sha256(copy) == before[name]), None)
    if then is None:
        return f"{name} is another"
    old, new = then.read_bytes(), (folder / name).read_bytes()
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    keys: list[str] = []
    if name.endswith(".json"):
        try:
            keys = list(islice(value_changes(json.loads(old), json.loads(new)), SHOWN))
        except ValueError:
            keys = ["it is no JSON any more"]
    return f"{name} from byte {at} on" + (f": {'; '.join(keys)}" if keys else "")


def _template(recorded: Mapping[str, str], config: RunConfig, kept: Kept, folder: Path,
              other_tokenizer: bool) -> Iterator[Change]:
    setting = config.data.chat_template
    try:
        # else it is the config's own text, or the tokenizer's, whose files are the same
        in_file = setting not in (None, PLAIN) and not is_jinja(setting)
        texts = _texts_now(folder, setting) if other_tokenizer or in_file else None
    except (UserError, OSError, ValueError) as error:
        yield Change("chat template", BOTH, str(error).partition("\n")[0], became="missing")
        return
    now = recorded if texts is None else {name: digest_of(text) for name, text in texts.items()}
    if now == recorded:
        if recorded:
            yield Change("chat template", BOTH, ", ".join(f"{name} {digest}" for name, digest in recorded.items()))
        return
    said, shown = [], {}
    for name in [*recorded, *(name for name in now if name not in recorded)]:
        if name not in now or name not in recorded:
            said.append(f"'{name}' is {'gone' if name in recorded else 'new'}")
        elif now[name] != recorded[name]:
            assert texts is not None, "only then is anything another"
            shown[name] = text_change(kept.templates[name], texts[name]) if name in kept.templates else "another text"
            said.append(f"'{name}' {shown[name]}")
    yield Change("chat template", BOTH, examples(said), became="changed", details={"templates": shown})


def _texts_now(folder: Path, setting: str | None) -> dict[str, str]:
    with torch_hidden():                                 # the tokenizer needs no torch, whose import takes seconds
        from dpo_dist.models.tokenizer import load_tokenizer
    return template_texts(load_tokenizer(folder), setting) or {}
