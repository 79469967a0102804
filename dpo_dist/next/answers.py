"""The next round's own answers: sampled from the trained model to the training prompts, rated by a judge."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DataConfig
from dpo_dist.data.rows import read_rows
from dpo_dist.data.store import PairStore
from dpo_dist.judge import Judge
from dpo_dist.models.whole import check_whole
from dpo_dist.models.workers import workers
from dpo_dist.policy.answers import Asking, Ids, sampled
from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.types import PreferenceRow


@dataclass
class AnswerReport:
    """What became of the prompts."""

    prompts: int = 0
    rows: int = 0
    cut: int = 0                             # answers that did not end by themselves, or are empty
    alike: int = 0                           # prompts whose answers are rated alike, or are one


def write_answers(file: Path, model: Path, data: DataConfig, pairs: PairStore, tokenizer: Any, asking: Asking,
                  judge: Judge, gpus: int, terminal: Terminal) -> AnswerReport:
    """Writes rows of the format `ratings`: each training prompt once, with its answers and the judge's scores. Answers
    that were cut are left out: their end would be taken for one. UserError where the model is damaged."""
    check_whole(model, "model")
    first = np.unique(np.asarray(pairs.content)[:, 0], return_index=True)[1]
    rows = _rows_of(data, pairs, sorted(first.tolist()))
    prompts: list[Ids] = [tuple(pairs.parts(i)[0].tolist()) for i in rows]
    with workers(gpus) as pool:
        answers = sampled(model, prompts, asking, file.parent / "answers", pool, terminal)
    report = AnswerReport(len(prompts))
    texts = [_texts(tokenizer, given, asking.stop, report) for given in answers]
    asked = [(at, text) for at, of_prompt in enumerate(texts) for text in of_prompt if len(of_prompt) > 1]
    scores = iter(judge.score([str(tokenizer.decode(prompts[at])) for at, _ in asked], [text for _, text in asked]))
    lines = []
    for row, of_prompt in zip(rows.values(), texts, strict=True):
        ratings = [next(scores) for _ in of_prompt] if len(of_prompt) > 1 else []
        if len(set(ratings)) < 2:
            report.alike += 1
            continue
        lines.append(json.dumps({**_prompt(row), "responses": of_prompt, "ratings": ratings}) + "\n")
    report.rows = len(lines)
    write_atomic(file, "".join(lines))
    return report


def _rows_of(data: DataConfig, pairs: PairStore, wanted: list[int]) -> dict[int, PreferenceRow]:
    """{pair: the row that it came from}, of the wanted pairs, in order."""
    at = {(int(pairs.source[i]), pairs.where_of(i)): i for i in reversed(wanted)}
    found: dict[int, PreferenceRow] = {}
    for source, dataset in enumerate(data.train):
        for row in read_rows(dataset, "skip")[0]:
            i = at.get((source, row.where))
            if i is None or i in found:
                continue
            if not isinstance(row, PreferenceRow):
                raise UserError(f"{row.where} holds token ids, no texts, to which answers could be written as rows; "
                                "next.answers needs data of texts or chats")
            found[i] = row
    assert len(found) == len(wanted), "the store was made of these files"
    return dict(sorted(found.items()))


def _prompt(row: PreferenceRow) -> dict[str, Any]:
    """The row's prompt as the format `ratings` has it."""
    whole = {"prompt": row.prompt if isinstance(row.prompt, str) else list(row.prompt),
             "tools": list(row.tools), "chat_template_kwargs": row.template_kwargs}
    return {name: value for name, value in whole.items() if value or name == "prompt"}


def _texts(tokenizer: Any, answers: list[Ids], stop: Ids, report: AnswerReport) -> list[str]:
    """The different answers that ended by themselves."""
    texts = [str(tokenizer.decode(ids[:-1], skip_special_tokens=True)).strip() for ids in answers if ids[-1:] and
             ids[-1] in stop]
    kept = [text for text in texts if text]
    report.cut += len(answers) - len(kept)
    return list(dict.fromkeys(kept))
