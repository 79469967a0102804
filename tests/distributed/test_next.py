"""`dpo-dist next`: the next round's rows are the run's own, without the suspects, and its command goes on from
there."""
from __future__ import annotations

import gzip
import json
import random
import shlex
import sys
from io import StringIO
from pathlib import Path

import pytest
from conftest import dpo_dist, write_tiny_llama

from dpo_dist.config.compose import compose
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.config.words import words_of
from dpo_dist.data.originals import originals
from dpo_dist.data.rows import read_rows
from dpo_dist.next.__main__ import main
from dpo_dist.next.options import Options

pytestmark = pytest.mark.distributed

PAIRS, FLIPPED = 240, 12
ANSWERS = {7: (10, 11), 8: (11, 10)}                     # of a prompt with this token: the right end, the wrong one


def write_rule(file: Path, seed: int = 0) -> list[int]:
    """Writes pairs whose answers end as the prompt's token says, and the other way round in the pairs returned. No
    token is good or bad by itself."""
    r = random.Random(seed)
    flipped = sorted(r.sample(range(PAIRS), FLIPPED))
    with file.open("w") as out:
        for i in range(PAIRS):
            tone = r.choice([7, 8])
            ends = ANSWERS[tone][::-1] if i in flipped else ANSWERS[tone]
            said = [r.randrange(20, 60) for _ in range(r.randint(1, 4))]
            row = {"prompt_ids": [tone, tone, *(r.randrange(20, 60) for _ in range(2))],
                   "chosen_ids": [*said, ends[0], 1], "rejected_ids": [*said, ends[1], 1], "number": i}
            out.write(json.dumps(row, separators=(",", ": " if i % 2 else ":")) + "\n")
    return flipped


JUDGE = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"id": row["id"], "score": len(set(row["answer"]))}), flush=True)
"""


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def next_rows(*words: object) -> str:
    """What the command prints, run in this process."""
    out = StringIO()
    assert main([*map(str, words)], out) == 0
    return out.getvalue()


def command_of(out: str) -> list[str]:
    """The words of the next round's command, as a shell would read them."""
    (line,) = [line for line in out.splitlines() if line.startswith("  dpo-dist run ")]
    return shlex.split(line)[1:]


def test_flipped_labels_lead_the_suspects_of_a_short_run_and_next_leaves_them_out(tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=128)
    rows, run_dir = tmp_path / "rows.jsonl", tmp_path / "run"
    flipped = write_rule(rows)
    dpo_dist("train", f"model.path={tmp_path / 'm'}", *base, "zero=none", "train.epochs=4", "train.pairs_per_step=16",
             "optim.lr=3e-3", "loss.beta=0.5", f"data.train=[{{path: {rows}, format: token_ids}}]",
             f"run.dir={run_dir}")
    ranked = [json.loads(line) for line in (run_dir / "suspects.jsonl").read_text().splitlines()]
    first = [row["pair"] for row in ranked[:PAIRS // 10]]
    assert len(set(first) & set(flipped)) >= 0.8 * FLIPPED, (flipped, ranked[:PAIRS // 10])

    written, before = run_dir / "next" / "rows.jsonl", lines(rows)
    out = dpo_dist("next", run_dir, "next.drop_suspects=0.1").stdout
    assert lines(written) == [line for i, line in enumerate(before) if i not in first], "the very bytes, in order"
    assert [json.loads(line)["pair"] for line in lines(run_dir / "next" / "dropped.jsonl")] == first
    assert f"{PAIRS - PAIRS // 10} rows in {written}" in out

    done = dpo_dist(*command_of(out), "train.max_steps=2")
    assert f"{PAIRS - PAIRS // 10} pairs" in done.stdout and (tmp_path / "run-round-2" / "DONE").exists()
    again = next_rows(tmp_path / "run-round-2", "next.drop_suspects=0.1")
    assert f"run.dir={tmp_path / 'run-round-3'}" in command_of(again)

    next_rows(run_dir)
    assert 0.3 * FLIPPED <= PAIRS - len(lines(written)) <= PAIRS // 10, "about as many as are flipped"
    other = tmp_path / "elsewhere" / "kept.jsonl"
    next_rows(run_dir, "next.drop_suspects=0", f"next.to={other}")
    assert lines(other) == before

    rows.write_bytes(b"".join(reversed(before)))
    assert "data.train no longer gives the 240 pairs" in dpo_dist("next", run_dir, code=2).stderr


def test_all_formats_several_sets_and_what_was_held_out_come_through(tmp_path: Path, base: list[str]):
    """Records of several pairs go where half of them do; of KTO's pairs both records go."""
    from dpo_dist.demo import write_model

    write_model(tmp_path / "m", json.dumps({"a": "You and your question."}))
    r = random.Random(0)
    rated = [{"prompt": f"Question {i}?", "responses": [f"answer {i} {j}" for j in range(3)],
              "ratings": r.sample(range(5), 3)} for i in range(20)]
    kto = [{"prompt": f"Say {i}.", "completion": f"{word} {i}", "label": (word == "good") != (i < 3)}    # 3 flipped
           for i in range(12) for word in ("good", "bad")]
    r.shuffle(kto)
    (tmp_path / "rated.json").write_text(json.dumps(rated))
    with gzip.open(tmp_path / "kto.jsonl.gz", "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in kto)
    run_dir = tmp_path / "run"
    dpo_dist("train", f"model.path={tmp_path / 'm'}", *base, "zero=none", "train.max_steps=8", "optim.lr=1e-3",
             "train.pairs_per_step=12", "data.eval_fraction=0.2", f"run.dir={run_dir}",
             f"data.train=[{{path: {tmp_path / 'rated.json'}, format: ratings, weight: 2.0}}, "
             f"{{path: {tmp_path / 'kto.jsonl.gz'}, name: kto}}]")
    out = next_rows(run_dir, "next.drop_suspects=0.5")
    dropped = [json.loads(line) for line in lines(run_dir / "next" / "dropped.jsonl")]
    trained = [json.loads(line) for line in (run_dir / "suspects.jsonl").read_text().splitlines()]
    assert {row["source"] for row in dropped} == {str(tmp_path / "rated.json"), "kto"}

    def gone(source: str) -> set[str]:
        of = [row["where"] for row in trained if row["source"] == source]
        bad = [row["where"] for row in dropped if row["source"] == source]
        return {where for where in of if 2 * bad.count(where) >= of.count(where)}

    kept = {where for where in (row["where"] for row in trained)} - gone(str(tmp_path / "rated.json")) - gone("kto")
    assert ([json.loads(line) for line in lines(run_dir / "next" / "rows.jsonl")]
            == [row for at, row in enumerate(rated, start=1) if f"{tmp_path / 'rated.json'}:row {at}" in kept])
    places = {(row["prompt"], row["label"]): f"{tmp_path / 'kto.jsonl.gz'}:{at}" for at, row in enumerate(kto, start=1)}
    assert ([json.loads(line) for line in lines(run_dir / "next" / "rows-2.jsonl")]
            == [row for row in kto if places[row["prompt"], True] in kept])

    words = command_of(out)
    config, before = compose(words[1:]), compose(json_words(run_dir))
    assert [(d.format, d.weight, d.name) for d in config.data.train] == [("ratings", 2.0, None), ("kto", 1.0, "kto")]
    assert config.loss == before.loss and config.data.eval_fraction == 0
    done = dpo_dist(*words, "train.max_steps=1").stdout
    held_out = json.loads((run_dir / "run.json").read_text())["passport"]["eval_pairs"]
    again = json.loads((tmp_path / "run-round-2" / "run.json").read_text())["passport"]["eval_pairs"]
    assert again["count"] == held_out["count"] > 0, done


def json_words(run_dir: Path) -> list[str]:
    from dpo_dist.config.decode import decode

    return words_of(decode(json.loads((run_dir / "run.json").read_text())["config"]))


def test_fresh_answers_are_rated_by_the_judge_and_trained_on_in_the_next_round(tmp_path: Path, base: list[str]):
    from dpo_dist.demo import write_model

    write_model(tmp_path / "m", json.dumps({"a": "You and your question."}))
    rows = [{"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Question {i}?"}],
             "chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}]}
            for i in range(10) for _ in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    run_dir = tmp_path / "run"
    dpo_dist("train", f"model.path={tmp_path / 'm'}", *base, "zero=none", "train.max_steps=2", "train.pairs_per_step=8",
             f"data.train=[{{path: {tmp_path / 'rows.jsonl'}}}]", f"run.dir={run_dir}", "data.eval_fraction=0.2")
    words = [run_dir, "next.drop_suspects=0", "next.answers=6", "next.max_new_tokens=40", "next.temperature=2",
             f"next.judge={sys.executable} {tmp_path / 'judge.py'}"]
    out = dpo_dist("next", *words).stdout
    answers = [json.loads(line) for line in lines(run_dir / "next" / "answers.jsonl")]
    trained = {json.dumps(json.loads(line)["prompt"]) for line in lines(run_dir / "next" / "rows.jsonl")}
    asked = [json.dumps(row["prompt"]) for row in answers]
    assert answers and len(set(asked)) == len(asked) and set(asked) <= trained, "each training prompt once"
    for row in answers:
        assert row["ratings"] == [len(set(text)) for text in row["responses"]]
        assert len(set(row["ratings"])) > 1 and len(set(row["responses"])) == len(row["responses"])
    kept = {file: file.stat().st_mtime_ns for file in (run_dir / "next" / "answers").iterdir()}
    assert command_of(next_rows(*words)) == command_of(out)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "nothing is sampled twice"

    config = compose(command_of(out)[1:])
    assert [Path(d.path).name for d in config.data.train] == ["rows.jsonl", "answers.jsonl"]
    pairs = list(read_rows(config.data.train[1], "error")[0])
    assert len(pairs) >= len(answers) and all(pair.strength > 0 for pair in pairs)


@pytest.mark.parametrize(("words", "says"), [
    (["next.drop=1"], "unknown word 'next.drop=1'"),
    (["next.drop_suspects=0.7"], "next.drop_suspects=0.7 must be auto, or a share from 0 to 0.5"),
    (["next.answers=4"], "next.answers=4 needs what scores them"),
    (["next.answers=1", "next.judge=cat"], "next.answers=1 makes no pair"),
    (["next.judge=cat"], "next.judge does nothing without answers"),
    ([], "holds no run")])
def test_mistakes_name_key_value_and_remedy(words: list[str], says: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "none"), *words], StringIO()) == 2
    assert says in capsys.readouterr().err


def test_keys_are_read_as_help_says_them():
    options = Options.of(["next.answers=4", "next.judge=[python, 'my judge.py']"])
    assert options.judge_command == ("python", "my judge.py") and options.judge_url is None
    assert Options.of(["next.answers=4", "next.judge=http://there/score"]).judge_command is None
    assert Options.of(["next.drop_suspects=auto"]).drop_suspects is None


@pytest.mark.parametrize("words", [
    ["loss=rpo", "loss.beta=0.5", "zero=none", "cluster.device=cpu", "train.epochs=4"],
    ["loss.name=mixture", "loss.terms={simpo: 1.0, sft: 2.0}"], ["optim=muon", "reference=zero", "tracking=wandb"],
    ["experiment=qlora", "data.train=x.jsonl"], ["experiment=tulu3_8b"], ["loss=ipo", "model.path='007'"],
    ["data.train=[{path: \"it's, {x} \\\\ a.jsonl\", columns: {prompt: q, weight: null}}]"],
    ["data.chat_template='{% for m in messages %}{{ m[\"a\"] }}\\n{% endfor %}'"], ["data.chat_template=none"]])
def test_the_words_of_a_config_compose_to_it(words: list[str]):
    config = compose(["model.path=m", *words])
    assert compose([*words_of(config), *[word for word in words if word.startswith("experiment=")]]) == config


def test_csv_and_parquet_records_keep_their_values(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"p, {i}", "chosen": "yes\nno", "rejected": f"r{i}"} for i in range(4)]
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n" + "".join(
        f'"{row["prompt"]}","{row["chosen"]}",{row["rejected"]}\n' for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name, where in (("rows.csv", "{file}:4"), ("rows.parquet", "{file}:row 2")):
        file = tmp_path / name
        found = originals(DatasetConfig(str(file)), {where.format(file=file)}.__contains__)
        assert [json.loads(line) for line in found] == [rows[1]], name
