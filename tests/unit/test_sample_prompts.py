"""Which held-out prompts are answered during training, and where the answers end."""
from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_rows

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.demo import write_inputs
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.run.samples import Samples, stop_ids


def test_the_prompts_depend_on_content_alone_and_more_keep_those_that_fewer_gave(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    twice = [*rows, *({**row, "chosen_ids": [5, 1]} for row in rows)]
    random.Random(1).shuffle(twice)
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))

    def chosen(file: str, number: int) -> list[tuple[int, ...]]:
        config = compose(["model.path=m", f"data.eval=[{{path: {tmp_path / file}, format: token_ids}}]",
                          f"data.cache_dir={tmp_path / 'tokens'}", f"eval.samples={number}"])
        inputs = SimpleNamespace(eval=prepare(config.data, None, None)[1], policy=ModelFolder(tmp_path))
        return list(Samples.of(config, inputs).prompts)

    assert chosen("rows.jsonl", 4) == chosen("twice.jsonl", 4) == chosen("rows.jsonl", 9)[:4]
    assert len({*chosen("twice.jsonl", 99)}) == len(chosen("twice.jsonl", 99)) == 12, "each prompt once"


@pytest.mark.parametrize("template, ends", [("null", {"<|endoftext|>", "<|im_end|>", "<|im_start|>"}),
                                            ("none", {"<|endoftext|>", "<|im_start|>"})])
def test_answers_end_where_the_datas_do_and_where_the_models_generation_stops(tmp_path: Path, template: str,
                                                                              ends: set[str]):
    write_inputs(tmp_path)
    folder = tmp_path / "base"
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "<|endoftext|>"
    known = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")}
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "eos_token_id": [known["<|im_start|>"]]}))
    config = compose(["model.path=m", f"data.chat_template={template}"])
    assert stop_ids(folder, tokenizer, config) == tuple(sorted(known[token] for token in ends))
