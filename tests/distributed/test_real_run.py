"""`make real` with a tiny model: killed while it samples, it goes on; its figures are what it says they are. And the
real model, where it is there."""
from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from conftest import REAL_MODEL, forked, kill, wait_until

pytestmark = pytest.mark.distributed

PROGRAM = """
import sys
from pathlib import Path
from dpo_dist.real.__main__ import Work, main
from dpo_dist.real.answers import Sampling
from dpo_dist.real.prompts import HELD_OUT, TRAINING

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    work = Work(tuple(sorted(TRAINING, key=len)[:33]), tuple(sorted(HELD_OUT, key=len)[:9]), Sampling(3, 1.0, 24))
    sys.exit(main(folder / "run", [f"model.path={folder / 'm'}", *sys.argv[2:]], work))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from dpo_dist.demo import write_model

    write_model(tmp_path / "m", json.dumps({"a": "You and your question."}))
    return tmp_path / "m"


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_with_a_table_of_what_its_answers_are(tmp_path: Path, tiny: Path):
    from dpo_dist.real.answers import Answer
    from dpo_dist.real.prompts import HELD_OUT
    from dpo_dist.real.rules import RULES

    (tmp_path / "program.py").write_text(PROGRAM)
    words = [tmp_path / "program.py", tmp_path, "train.epochs=1", "optim.lr=1e-3", "train.pairs_per_step=4"]
    kept = tmp_path / "run" / "answers"
    killed = forked(*words)
    wait_until(lambda: list(kept.glob("*.json")), killed)
    kill([killed.pid])
    first = {file: file.stat().st_mtime_ns for file in kept.glob("*.json")}
    run = forked(*words)
    out, err = run.communicate(300)
    assert run.wait() == 0, out + err
    assert {file: file.stat().st_mtime_ns for file in first} == first, "what was kept is not sampled again"
    assert len(list(kept.glob("*.json"))) == 3 + 1 + 1, "training, held out before, held out after"

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "before and after DPO" in out and "KL(policy || reference)" in out
    assert result["before"]["answers"] == result["after"]["answers"] == 27
    blocks = [json.loads(file.read_text()) for file in kept.glob("*.json")]
    held_out = [[Answer(**said) for said in block] for block in blocks if block[0]["prompt"] in HELD_OUT]
    shares = {round(statistics.mean(RULES["one paragraph, no list, no markup"](a) for a in answers), 4)
              for answers in held_out}
    assert shares == {result[when]["rules"]["one paragraph, no list, no markup"] for when in ("before", "after")}
    assert result["kl"]["an_answer"] + 3 * result["kl"]["an_answer_error"] > 0
    assert result["after"]["neutral_nats"] != result["before"]["neutral_nats"]
    assert {"1/4", "2/4", "3/4", "4/4"} == set(result["steps"])


def test_answers_are_those_of_plain_generation_and_their_log_probs_those_of_the_plain_forward(tmp_path: Path,
                                                                                             tiny: Path):
    import torch

    from dpo_dist.logps import plain_token_logps
    from dpo_dist.models.workers import model_of, tokenizer_of
    from dpo_dist.real.answers import Answer, Sampling, encoded, sample_block
    from dpo_dist.real.likelihood import answer_logps

    prompts = ["How are you?", "What is a long question, for padding?"]
    sample_block(tiny, prompts, Sampling(2, 0.9, 12, seed=1), 4, tmp_path / "block.json")
    block = json.loads((tmp_path / "block.json").read_text())
    tokenizer, model = tokenizer_of(tiny), model_of(tiny)
    inputs = encoded(tokenizer, [prompt for prompt in prompts for _ in range(2)])
    torch.manual_seed(1_000_003 + 4)
    out = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, temperature=0.9, max_new_tokens=12)
    plain = out[:, inputs["input_ids"].shape[1]:].tolist()
    ids = [answer["ids"] for answer in block]
    assert [answer["prompt"] for answer in block] == [prompt for prompt in prompts for _ in range(2)]
    assert [row[:len(one)] for row, one in zip(plain, ids, strict=True)] == ids and max(map(len, ids)) == 12

    answers = [Answer("?", "", (5, 6, 7), True), Answer("?", "", (8, 9), False)]
    start = encoded(tokenizer, prompts[:1])["input_ids"][0]
    ends = [[5, 6, 7, tokenizer.eos_token_id], [8, 9]]
    with torch.no_grad():
        wanted = [float(plain_token_logps(model, start, torch.tensor(end)).sum()) for end in ends]
    assert answer_logps(tiny, prompts[0], answers, 1.0) == pytest.approx(wanted, abs=1e-4)
    assert answer_logps(tiny, prompts[0], answers, 0.5) != pytest.approx(wanted, abs=1e-2)


def test_the_real_model_chats_in_plain_transformers():
    if not REAL_MODEL.is_dir():
        pytest.skip(f"{REAL_MODEL} is missing; `make real` makes it, or set DPO_DIST_REAL_MODEL")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(REAL_MODEL), AutoModelForCausalLM.from_pretrained(REAL_MODEL)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    assert "Paris" in said
