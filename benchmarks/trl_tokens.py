"""Token ids of dpo-dist beside those of TRL's own data set preparation: python benchmarks/trl_tokens.py DATA_FOLDER.

For each set of DATA_FOLDER (dpo_en_demo.json, hh_harmless_test.jsonl.gz) and each chat template that ships in TRL's
wheel (a dozen that differ, or --all), a tokenizer of the template's family is made (chat_tokenizers.py). DPOTrainer
prepares the rows as lists of messages; dpo-dist reads the file itself. What differs is counted by kind
(trl_differences.py) and judged (trl_verdicts.py). Needs TRL beside dpo-dist. Results go to
benchmarks/results/trl_tokens.json as they come out; tables.py writes README's table from them.
"""
from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import trl
from chat_tokenizers import VOCABULARY, family_of, trained, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.data_utils import _tokenize
from trl_differences import Comparison, Ids, Judge, Row

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.data.rows import read_rows
from dpo_dist.data.tokenize import PairTokenizer
from dpo_dist.types import TokenizedPair

TEMPLATES = ("qwen2_5", "qwen3", "qwen3_5_think", "llama3", "gemma", "gptoss", "deepseek_r1_distill", "nemotron_3_nano",
             "glm4moe", "glm4moe_training", "phi3", "cohere2", "smolvlm")
SETS = {"dpo_en_demo.json": "sharegpt", "hh_harmless_test.jsonl.gz": "hh"}
SHIPPED = Path(trl.__file__).parent / "chat_templates"
RESULTS = Path(__file__).parent / "results" / "trl_tokens.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--all", action="store_true", help="every template of the wheel")
    parser.add_argument("--templates", nargs="*", default=TEMPLATES)
    parser.add_argument("--rows", type=int, help="only the first so many of each set")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    datasets.disable_caching()
    sets = {name: rows_for_trl(args.data / name, args.rows) for name in SETS}
    cores = trained([turn["content"] for rows in sets.values() for row in rows.values() for part in row.values()
                     for turn in part])
    report: dict[str, Any] = {"trl": version("trl"), "transformers": version("transformers"),
                              "rows": {name: len(rows) for name, rows in sets.items()}, "templates": {}}
    if args.results.is_file() and {**(before := json.loads(args.results.read_text())), "templates": {}} == report:
        report = before                      # what it says of other templates stays
    with tempfile.TemporaryDirectory() as out:
        model = write_model(Path(out) / "model")
        for template in sorted(path.stem for path in SHIPPED.glob("*.jinja")) if args.all else args.templates:
            folder = Path(out) / template
            write_tokenizer(folder, template, (SHIPPED / f"{template}.jinja").read_text(), cores)
            found = {name: compare(folder, template, model, args.data / name, SETS[name], rows)
                     for name, rows in sets.items()}
            report["templates"][template] = found
            args.results.write_text(json.dumps(report, default=vars, indent=1, ensure_ascii=False) + "\n")
            print(template, {name: {kind: entry.count for kind, entry in result.kinds.items()}
                             for name, result in found.items()}, flush=True)


def compare(folder: Path, template: str, model: Path, path: Path, form: str, rows: dict[int, Row]) -> Comparison:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if family_of(template).in_parts:
        rows = {n: _in_parts(row) for n, row in rows.items()}
    trls, refused_by_trl = by_trl(tokenizer, model, rows)
    ours, refused_by_us = by_us(folder, path, form, rows)
    result = Comparison()
    judge = Judge(tokenizer, family_of(template).stops)
    for n, row in rows.items():
        if n in trls and n in ours:
            judge.compare(result, n, row, trls[n], ours[n])
        elif n in trls:
            judge.only_trl(result, n, row, trls[n], refused_by_us[n])
        else:
            who = "both refuse" if n in refused_by_us else "TRL stops"
            result.note(f"row: {who}: {refused_by_trl[n][:100]}", f"row {n}: {refused_by_us.get(n, '')}")
    return result


# ------------------------------------------------------------------------------------------------------- rows for TRL


def rows_for_trl(path: Path, limit: int | None) -> dict[int, Row]:
    """{row number from 1: prompt, chosen and rejected as lists of messages}, as a person converts these files."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        if path.suffix == ".json":
            return dict(enumerate(map(_from_sharegpt, json.load(file)[:limit]), 1))
        return dict(enumerate((_from_transcripts(json.loads(line)) for line in islice(file, limit)), 1))


def _from_sharegpt(row: Row) -> Row:
    def turn(value: Row) -> Row:
        role = {"human": "user", "gpt": "assistant"}.get(value["from"], value["from"])
        return {"role": role, "content": value["value"]}
    return {"prompt": [turn(value) for value in row["conversations"]], "chosen": [turn(row["chosen"])],
            "rejected": [turn(row["rejected"])]}


def _from_transcripts(row: Row) -> Row:
    chosen, rejected = (_turns(row[key]) for key in ("chosen", "rejected"))
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(transcript: str) -> list[Row]:
    """Turns; what one speaker says twice in a row is one turn, since most templates refuse it otherwise."""
    turns: list[Row] = []
    said_by = re.findall(r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", transcript, re.DOTALL)
    for speaker, said in said_by:
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + said.strip()
        else:
            turns.append({"role": role, "content": said.strip()})
    return turns


def _in_parts(row: Row) -> Row:
    """The row as TRL gives it to a processor: contents are lists of parts."""
    return {name: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
            for name, turns in row.items()}


# -------------------------------------------------------------------------------------------------- both tokenizations


def by_trl(tokenizer: PreTrainedTokenizerFast, model: Path, rows: dict[int, Row]) -> tuple[dict[int, Ids],
                                                                                           dict[int, str]]:
    """DPOTrainer's own columns; and the rows at which it would have stopped, with its message."""
    refused = {}
    try:
        prepared = _prepared(tokenizer, model, rows)
    except Exception:                        # whatever is raised, a run ends by it: which rows raise it?
        for n, row in rows.items():
            try:
                _tokenize(tokenizer, row["prompt"], add_generation_prompt=True)
                for side in ("chosen", "rejected"):
                    _tokenize(tokenizer, row["prompt"] + row[side])
            except Exception as error:
                refused[n] = f"{type(error).__name__}: {error}"
        if not refused:
            raise
        rest = {n: row for n, row in rows.items() if n not in refused}
        prepared = _prepared(tokenizer, model, rest) if rest else []
    return {row["row"]: (tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))
            for row in prepared}, refused


def _prepared(tokenizer: PreTrainedTokenizerFast, model: Path, rows: dict[int, Row]) -> list[Row]:
    data = datasets.Dataset.from_list([{**row, "row": n} for n, row in rows.items()])
    args = DPOConfig(output_dir=str(model.parent / "out"), use_cpu=True, bf16=False, max_length=None, report_to=[],
                     disable_tqdm=True)
    return list(DPOTrainer(str(model), args=args, train_dataset=data, processing_class=tokenizer)
                .train_dataset.to_list())


def write_model(folder: Path) -> Path:
    """A folder with a small model: DPOTrainer wants one."""
    config = LlamaConfig(vocab_size=VOCABULARY + 2000, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def by_us(folder: Path, path: Path, form: str, wanted: dict[int, Row]) -> tuple[dict[int, Ids], dict[int, str]]:
    """dpo-dist's pairs by row number; and what it refuses, with its message."""
    config = compose([f"model.path={folder}", f"data.train=[{{path: {path}, format: {form}}}]", "data.on_bad_row=skip",
                      "data.max_length=1000000"]).data
    read, report = read_rows(config.train[0], "skip")
    rows = [row for row in read if _number(row.where) in wanted]
    pairs: dict[int, Ids] = {}
    refused = dict.fromkeys(wanted, "bad row: " + "; ".join(report.bad.counts))
    try:
        encoder = PairTokenizer.of(PreTrainedTokenizerFast.from_pretrained(folder), config)
        for row, pair in zip(rows, encoder.encode(rows), strict=True):
            n = _number(row.where)
            if isinstance(pair, TokenizedPair):
                pairs[n] = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
                del refused[n]
            else:
                refused[n] = f"{pair.reason}: {pair.detail}"
    except UserError as error:
        refused = dict.fromkeys(wanted, f"the whole set: {error}")
    return pairs, refused


def _number(where: str) -> int:
    return int(re.findall(r"\d+", where)[-1])


if __name__ == "__main__":
    main()
