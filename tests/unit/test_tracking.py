"""What was measured is kept once, wherever it goes, through kills and resumes."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.run.tracking.make import check_tracker, open_tracker

REPO = Path(__file__).resolve().parents[2]


def config(*overrides: str) -> RunConfig:
    return compose(["model.path=m", "data.train=[{path: rows.jsonl}]", *overrides])


def row(step: int, split: str = "train", **values: float) -> dict[str, object]:
    return {"step": step, "split": split, "loss": 0.5, "rewards/margins": 0.25, **values}


def rows_of(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def track(run_dir: Path, steps: range, resumed_step: int = 0, *overrides: str) -> None:
    tracker = open_tracker(config(*overrides), str(run_dir), True, resumed_step)
    for step in steps:
        tracker.log(row(step))
    tracker.finish({"loss": 0.5})


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nobody has logged in to W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


def test_a_row_is_one_json_line_as_it_was_given(tmp_path: Path) -> None:
    tracker = open_tracker(config(), tmp_path / "run", True, 0)
    tracker.log(row(0, "eval"))
    assert rows_of(tmp_path / "run") == [row(0, "eval")], "readable before the run is over"
    tracker.log(row(1))
    tracker.finish({})
    assert rows_of(tmp_path / "run") == [row(0, "eval"), row(1)]


def test_a_value_that_json_has_no_number_for_is_text_that_float_reads(tmp_path: Path) -> None:
    tracker = open_tracker(config(), tmp_path, True, 0)
    tracker.log(row(1, grad_norm=float("nan"), lr=float("-inf")))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (kept,) = rows_of(tmp_path)
    assert (kept["grad_norm"], kept["lr"]) == ("nan", "-inf") and float(str(kept["lr"])) == float("-inf")


def test_a_resume_drops_the_rows_that_are_made_again(tmp_path: Path) -> None:
    track(tmp_path, range(0, 8))
    track(tmp_path, range(5, 10), 4)
    assert [r["step"] for r in rows_of(tmp_path)] == list(range(10))


def test_a_start_without_a_checkpoint_drops_all_rows_of_the_attempt_before(tmp_path: Path) -> None:
    track(tmp_path, range(0, 3))
    track(tmp_path, range(0, 2))
    assert [r["step"] for r in rows_of(tmp_path)] == [0, 1]


@pytest.mark.parametrize("torn", ['{"step": 2, "spl', '{"step": 2, "split": "train", "loss": 0.5}', "\0\0\0\n"])
def test_a_half_written_line_is_dropped(tmp_path: Path, torn: str) -> None:
    track(tmp_path, range(0, 2))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(torn)
    track(tmp_path, range(3, 5), 2)
    assert [r["step"] for r in rows_of(tmp_path)] == [0, 1, 3, 4]


def test_what_was_logged_before_a_kill_is_there(tmp_path: Path) -> None:
    script = f"""if True:
        import os, signal
        from dpo_dist.config.compose import compose
        from dpo_dist.run.tracking.make import open_tracker
        tracker = open_tracker(compose(["model.path=m", "data.train=[{{path: a}}]"]), {str(tmp_path)!r}, True, 0)
        for step in range(5):
            tracker.log({{"step": step, "split": "train", "loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in rows_of(tmp_path)] == [0, 1, 2, 3, 4]


def test_other_ranks_write_nothing_and_import_no_tracking_library(tmp_path: Path) -> None:
    script = f"""if True:
        import sys
        from dpo_dist.config.compose import compose
        from dpo_dist.run.tracking.make import open_tracker
        config = compose(["model.path=m", "data.train=[{{path: a}}]", "tracking=wandb"])
        tracker = open_tracker(config, {str(tmp_path / "run")!r}, False, 0)
        tracker.log({{"step": 1, "split": "train"}}), tracker.finish({{}})
        assert "wandb" not in sys.modules and "tensorboard" not in sys.modules and "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], cwd=REPO, timeout=60, check=True)
    assert not (tmp_path / "run").exists()


def test_wandb_works_offline_and_a_resumed_run_keeps_its_id(tmp_path: Path, no_login: None) -> None:
    track(tmp_path, range(0, 3), 0, "tracking=wandb")
    track(tmp_path, range(3, 5), 2, "tracking=wandb")
    run_id = (tmp_path / "wandb_id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2 and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2, "two parts of one run"
    assert all(b"train/rewards/margins" in file.read_bytes() and b"pairs_per_step" in file.read_bytes()
               for file in files)
    assert [r["step"] for r in rows_of(tmp_path)] == [0, 1, 2, 3, 4]


def test_wandb_online_without_a_login_says_what_to_do_and_does_not_ask(tmp_path: Path, no_login: None) -> None:
    with pytest.raises(UserError, match=r"tracking\.mode=online, but there is no W&B login.*tracking\.mode=offline"):
        open_tracker(config("tracking=wandb", "tracking.mode=online"), tmp_path, True, 0)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(tmp_path, range(0, 6), 0, "tracking=tensorboard")
    track(tmp_path, range(4, 8), 3, "tracking=tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/rewards/margins"}
    assert [e.step for e in events.Scalars("train/rewards/margins")] == list(range(8))
    assert events.Scalars("train/loss")[0].value == 0.5


SAMPLES = [{"step": 0, "prompt": "a <b>\nc", "completion": f"answer {i}", "tokens": 2, "ended": True} for i in range(2)]


def test_answers_are_kept_once_over_a_resume_and_a_kill_amid_writing(tmp_path: Path) -> None:
    def kept() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    def log(resumed_step: int, *steps: int) -> None:
        tracker = open_tracker(config(), tmp_path, True, resumed_step)
        for step in steps:
            tracker.log_samples(step, [{**row, "step": step} for row in SAMPLES])

    log(0, 0, 1, 2)
    assert kept() == [0, 0, 1, 1, 2, 2]
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "pro')
    log(1, 1)                                                # step 1 is evaluated again
    assert kept() == [0, 0, 1, 1]
    log(0, 0)
    assert kept() == [0, 0]


def test_tensorboard_and_wandb_show_answers(tmp_path: Path, no_login: None) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("tensorboard", "wandb"):
        tracker = open_tracker(config(f"tracking={name}"), tmp_path, True, 0)
        tracker.log_samples(4, SAMPLES)
        tracker.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("samples/1/text_summary")
    assert event.step == 4 and b"    a <b>\n    c" in event.tensor_proto.string_val[0]
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json")
    assert [row[:2] for row in json.loads(table.read_text())["data"]] == [["a <b>\nc", f"answer {i}"] for i in range(2)]


def test_mlflow_that_is_not_installed_is_one_message_with_the_remedy() -> None:
    with (mock.patch.dict(sys.modules, {"mlflow.entities": None}),
          pytest.raises(UserError, match=r"tracking=mlflow needs MLflow.*pip install 'dpo-dist\[mlflow\]'")):
        check_tracker(config("tracking=mlflow"))


def test_mlflow_keeps_a_run_and_a_resumed_run_goes_on_in_it(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install 'dpo-dist[mlflow]'")
    from mlflow.tracking import MlflowClient

    tracker = open_tracker(config("tracking=mlflow"), tmp_path, True, 0)
    tracker.log(row(1, grad_norm=float("nan")))
    tracker.log_samples(1, SAMPLES)
    tracker.finish({})
    client, run_id = MlflowClient((tmp_path / "mlruns").as_uri()), (tmp_path / "mlflow_id").read_text()
    assert client.get_run(run_id).info.status == "KILLED"
    track(tmp_path, range(2, 4), 1, "tracking=mlflow")
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == tmp_path.name
    assert found.data.params["train.pairs_per_step"] == "64" and found.data.metrics["train/loss"] == 0.5
    assert [m.step for m in client.get_metric_history(run_id, "train/rewards/margins")] == [1, 2, 3]
    assert len(client.search_runs([found.info.experiment_id])) == 1
    kept = next((tmp_path / "mlruns").rglob("samples/step-000001.json"))
    assert json.loads(kept.read_text()) == SAMPLES

    tracker = open_tracker(config("tracking=mlflow"), tmp_path, True, 3)
    (tmp_path / "mlruns").rename(tmp_path / "gone")
    tracker.log(row(4))
    tracker.finish({})
    assert rows_of(tmp_path)[-1]["step"] == 4, "a copy that cannot be made ends no training"
    with pytest.raises(UserError, match=r"tracking\.uri=nowhere://a: MLflow could not start"):
        open_tracker(config("tracking=mlflow", "tracking.uri=nowhere://a"), tmp_path / "other", True, 0)


def test_a_tracking_key_that_would_do_nothing_is_an_error() -> None:
    for choice in ("none", "tensorboard"):
        with pytest.raises(UserError, match=r"unknown key 'tracking\.project'"):
            config(f"tracking={choice}", "tracking.project=mine")
