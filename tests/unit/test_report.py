"""A report shows what a run's folder holds, says what it means, lets no text of a file become HTML, and asks the
network for nothing. What a browser makes of it is tried by benchmarks/report_pictures.py."""
from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from written_run import HOSTILE, write_lines, write_run, write_sweep

from dpo_dist.config.errors import UserError
from dpo_dist.report.__main__ import main
from dpo_dist.report.data_map import pairs_section
from dpo_dist.report.markup import joined, markup, script_json
from dpo_dist.report.run_files import RunFiles, number
from dpo_dist.report.shown import percent, plain, share
from dpo_dist.report.thinning import MOST_POINTS, moving_mean, thinned
from dpo_dist.report.verdict import verdict
from dpo_dist.report.write import write_report

SECTIONS = ["summary", "curves", "held-out", "frontier", "answers", "audit", "pairs", "provenance"]


class Page(HTMLParser):
    """What a browser would see of the file: sections, plots, scripts, texts, and everything that it would load."""

    def __init__(self, path: Path):
        super().__init__()
        self.sections: list[str] = []
        self.plots: list[str] = []
        self.scripts: dict[str, str] = {}
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self._script: str | None = None
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(str(found["id"]))
        if found.get("class") == "plot":
            self.plots.append(str(found["id"]))
        if tag == "script":
            self._script = found.get("id") or "page"
        self.loads += [str(found[name]) for name in ("src", "href", "srcset", "action") if name in found]

    def handle_endtag(self, tag: str) -> None:
        self._script = None if tag == "script" else self._script

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.texts.append(data)
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def figures(self) -> dict[str, Any]:
        return {figure["key"]: figure for figure in json.loads(self.scripts["figures"])}


def page_of(*folders: Path, to: Path | None = None) -> Page:
    return Page(write_report(folders, to))


# --------------------------------------------------------------------------------------------------- what is there


def test_a_report_shows_every_section_that_the_folder_has_files_for(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run"))
    assert page.sections == SECTIONS
    assert [f"plot-{key}" for key in page.figures] == page.plots and len(page.plots) == len(set(page.plots)) >= 18
    assert all(figure["numbers"] for figure in page.figures.values()), "each has its numbers as a table"
    for words in ("duplicate_pair", "Held-out accuracy 0.780 (0.723 to 0.837) is above", "Suspects", "RewardBench",
                  "dpo-dist run model.path=base", "chosen shorter", "856ed6a7a99106a24ec46a42aa39fad6"):
        assert words in page.text


@pytest.mark.parametrize(("missing", "section"), [
    (("metrics.jsonl", "samples.jsonl"), "curves"), (("evaluation.json", "judge.json"), "held-out"),
    (("evaluation.json", "metrics.jsonl"), "frontier"), (("samples.jsonl", "generations.json"), "answers"),
    (("audit.json",), "audit"), (("datamap.json",), "pairs")])
def test_a_section_is_absent_without_its_files_and_all_others_stay(tmp_path: Path, missing: tuple[str, ...],
                                                                   section: str):
    run = write_run(tmp_path / "run", steps=20)
    for name in missing:
        (run / name).unlink()
    shown = page_of(run).sections
    assert section not in shown and set(shown) >= set(SECTIONS) - {section, "frontier"}


def test_an_old_run_with_metrics_and_run_json_alone_has_a_report(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    for path in run.iterdir():
        if path.name not in ("run.json", "metrics.jsonl"):
            path.unlink()
    page = page_of(run)
    assert page.sections == ["summary", "curves", "frontier", "provenance"]
    assert "Held-out accuracy went from 50 % to" in page.text and "command.txt is missing" in page.text


def test_what_is_missing_inside_a_file_is_left_out(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    summaries = json.loads((run / "evaluation.json").read_text())["evaluations"]
    for summary in summaries:
        for key in ("calibration", "displacement", "kl", "length_controlled", "rewardbench"):
            summary[key] = None
        summary["slices"], summary["baselines"]["reference"] = [], None
    (run / "evaluation.json").write_text(json.dumps({"evaluations": summaries}))
    page = page_of(run)
    assert {"reliability", "slices"}.isdisjoint(page.figures) and "held-out" in page.sections
    assert "k3 on the data" in page.scripts["figures"], "no KL from samples: the estimate"


def test_a_half_written_line_is_left_out_and_told(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20, done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "split": "train", "loss": 0.')
    assert RunFiles(run).training[-1]["step"] == 20
    assert "1 line of metrics.jsonl could not be read (half written)" in page_of(run).text


def test_of_a_step_that_was_made_again_the_last_row_counts_and_what_is_no_number_is_no_point(tmp_path: Path):
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "metrics.jsonl", [
        {"step": 1, "split": "train", "loss": 9.0}, {"step": 2, "split": "train", "loss": "nan"},
        {"step": 1, "split": "train", "loss": 0.5}, {"step": 3, "split": "train", "loss": "inf", "lr": 1e-6}])
    (trace,) = page_of(tmp_path / "run").figures["loss"]["traces"]
    assert (trace["x"], trace["y"]) == ([1], [0.5])
    assert [number(value) for value in ("nan", "-inf", None, True, "0.25", [])] == [None, None, None, None, 0.25, None]


# ---------------------------------------------------------------------------------------------- safe and self-contained


def test_text_of_files_never_becomes_html_or_a_script(tmp_path: Path):
    calm, hostile = page_of(write_run(tmp_path / "calm")), page_of(write_run(tmp_path / "hostile", say=HOSTILE))
    assert sorted(hostile.tags) == sorted(calm.tags), "not one element more"
    assert list(hostile.scripts) == ["figures", "plotly", "page"]
    assert "<script>window.broken" not in hostile.source and "<script>window.broken = 1</script>" in hostile.text
    assert json.loads(hostile.scripts["figures"]) and "<" not in hostile.scripts["figures"]


def test_a_report_is_one_file_that_loads_nothing_and_is_the_same_for_the_same_files(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    page = page_of(run)
    assert all(where.startswith(("#", "data:")) for where in page.loads)
    assert not re.search(r"@import|url\(", page.source)
    script = gzip.decompress(base64.b64decode(page.scripts["plotly"]))
    assert script.startswith(b"/**\n* plotly.js v")
    assert page_of(run).source == page.source


def test_markup_escapes_what_is_not_markup_and_refuses_to_join_text():
    assert markup("<b>{}</b>{}", "<i>\0", markup("<br>")) == "<b>&lt;i&gt;\N{REPLACEMENT CHARACTER}</b><br>"
    assert script_json({"a": "</script><!--&"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026"}'
    with pytest.raises(AssertionError):
        joined([markup("<b>"), "text"])  # type: ignore[list-item]


def test_a_report_needs_neither_torch_nor_plotlys_python(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    program = ("import sys; from dpo_dist.report.__main__ import main; code = main(sys.argv[1:]); "
               "assert not {'torch', 'plotly', 'numpy', 'pyarrow'} & sys.modules.keys(); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"report: {run / 'report.html'}\n"), done.stderr


# ------------------------------------------------------------------------------------------------------------- numbers


def test_report_json_holds_the_numbers_of_every_plot_and_the_verdict(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    page, numbers = page_of(run), json.loads((run / "report.json").read_text())
    assert list(numbers["plots"]) == list(page.figures)
    held_out = next(table for table in numbers["plots"]["loss"]["tables"] if table["of"] == "held out")
    assert held_out["step"] == [0, 7, 13, 20] and held_out["loss"][0] == pytest.approx(0.6931, abs=1e-4)
    (one,) = numbers["runs"]
    assert one["verdict"][0]["level"] == "good" and one["verdict"][0]["words"].startswith(
        "Held-out accuracy 0.780 (0.723 to 0.837) is above what needs no training: “the longer answer” is right in "
        "58\xa0%; “the reference's likelier answer” is right in 61\xa0%;")
    assert one["numbers"]["calibration error (ECE)"] == "0.08"


def test_a_long_run_is_thinned_to_a_thousand_points_that_keep_its_spikes_and_says_so(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", steps=2500))
    raw, mean, *_ = page.figures["grad-norm"]["traces"]
    assert len(raw["x"]) == MOST_POINTS and len(mean["x"]) <= 260
    assert "Of 2,500 logged steps each curve shows 1,000" in page.text
    y = [0.0] * 5000
    y[1234], y[4321] = 7.0, -7.0
    x, kept = thinned(range(5000), y)
    assert x == sorted(x) and (1234, 7.0) in zip(x, kept, strict=True) and (4321, -7.0) in zip(x, kept, strict=True)
    assert moving_mean([1, 2, 3, 4], [1.0, 2.0, 3.0, 10.0], 3) == ([1, 2, 3, 4], [1.5, 2.0, 5.0, 6.5])


def test_the_guards_events_stand_in_the_curves_at_their_steps(tmp_path: Path):
    figures = page_of(write_run(tmp_path / "run", steps=60)).figures
    guard = figures["loss"]["traces"][-1]
    assert (guard["name"], guard["x"]) == ("guard", [20, 30])
    assert guard["text"][0].startswith("displacement, warn: chosen log-probs")
    assert [shape["x0"] for shape in figures["logps"]["layout"]["shapes"]] == [20, 30]
    assert not figures["lr"]["layout"]["shapes"]


def test_numbers_are_short_and_shares_have_their_intervals():
    assert [plain(value) for value in (0.1, 5e-7, -2, 1234567.0, 12345, 0.123456, "nan", None)] == [
        "0.1", "5e−7", "−2", "1.235e6", "12,345", "0.1235", "–", "–"]
    assert [percent(value) for value in (0.5, 0.012, None)] == ["50\xa0%", "1.2\xa0%", "–"]
    assert share({"value": 0.83, "low": 0.78, "high": 0.87, "n": 9}) == "0.830 (0.780 to 0.870)"


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(("change", "level", "words"), [
    (lambda s: s["baselines"]["length"].update(value=0.95), "error", "is below what needs no training: “the longer"),
    (lambda s: s["baselines"]["length"].update(value=0.76), "warning", "is not told apart from what needs no training"),
    (lambda s: s["displacement"].update(chosen_per_token=0.1), "good", "The chosen answers became likelier"),
    (lambda s: s["displacement"].update(chosen_per_token=-0.1), "info", "became a little less likely"),
    (lambda s: s["displacement"].update(chosen_per_token=-0.3), "warning", "Even the chosen answers became less"),
    (lambda s: s["calibration"].update(ece=0.3), "warning", "are off by 30\xa0% on average")])
def test_the_verdict_follows_the_figures(tmp_path: Path, change: Change, level: str, words: str):
    run = write_run(tmp_path / "run", steps=20)
    content = json.loads((run / "evaluation.json").read_text())
    change(content["evaluations"][-1])
    (run / "evaluation.json").write_text(json.dumps(content))
    assert any(of == level and words in note for of, note in verdict(RunFiles(run)))


# ------------------------------------------------------------------------------------------------ several runs, a sweep


def test_two_runs_stand_side_by_side_under_names_that_tell_them_apart(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    one = write_run(tmp_path / "a" / "run", steps=20)
    two = write_run(tmp_path / "b" / "run", steps=20, beta=0.4)
    monkeypatch.chdir(tmp_path)
    assert main([str(one), str(two)]) == 0 and capsys.readouterr().out == "report: report.html\n"
    page = Page(tmp_path / "report.html")
    assert page.sections == SECTIONS
    assert {trace["name"] for trace in page.figures["margin"]["traces"]} >= {"a/run · training", "b/run · held out"}
    assert "Where the configurations differ" in page.text and len(page.figures["frontier"]["traces"]) == 2
    assert page.text.count("320 rows, 320 pairs") == 1, "the same audit once"


def test_a_sweeps_report_links_its_runs_draws_what_was_swept_and_names_the_best_and_the_failed(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep")
    page = page_of(sweep)
    assert page.sections == ["summary", "runs", "swept", "frontier", "curves"]
    assert "beta_0.05-lr_5e-07-abc/report.html" in page.loads and sum("report.html" in at for at in page.loads) == 5
    assert "dpo-dist run model.path=base loss.beta=0.05" in page.text
    assert "loss.beta=0.3 optim.lr=1e-06 : the loss <of> step 3 is not finite" in page.text
    assert [len(trace["x"]) for trace in page.figures["swept-accuracies-optim-lr"]["traces"]] == [2, 2, 1]
    frontier = page.figures["frontier"]
    assert {trace["name"]: trace["beta"] for trace in frontier["traces"]} == {
        "optim.lr=1e-06": [pytest.approx(0.055), pytest.approx(0.11)],
        "optim.lr=5e-07": [pytest.approx(0.0525), pytest.approx(0.105), pytest.approx(0.315)]}


def test_a_random_search_is_plotted_over_each_number_and_not_as_lines(tmp_path: Path):
    jobs = [{"swept": {"loss.beta": 0.01 * i, "optim.lr": i * 1e-6}, "run_dir": f"run-{i}", "done": True, "message": "",
             "metrics": {"rewards/accuracies": 0.5 + i / 100}} for i in range(1, 13)]
    (tmp_path / "sweep.json").write_text(json.dumps({"objective": "loss", "direction": "minimize", "jobs": jobs,
                                                     "best": None}))
    page = page_of(tmp_path)
    assert list(page.figures) == ["swept-accuracies-loss-beta", "swept-accuracies-optim-lr"]
    assert {trace["mode"] for figure in page.figures.values() for trace in figure["traces"]} == {"markers"}


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_a_folder_without_a_run_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "nowhere is no folder"), ("empty", "holds nothing of a run")):
        assert main([str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    run = write_run(tmp_path / "run", steps=5)
    with pytest.raises(UserError, match="the same run is given twice"):
        write_report([run, tmp_path / "run" / "."])
    (run / "audit.json").write_text("{")
    with pytest.raises(UserError, match=r"audit\.json cannot be read"):
        write_report([run])


def test_the_command_becomes_the_report_and_says_where_it_is(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=5)
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "report", str(run), "--to",
                           str(tmp_path / "new" / "page.html")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and str(tmp_path / "new" / "page.html") in done.stdout
    assert (tmp_path / "new" / "page.json").exists() and not (run / "report.html").exists()


def test_pairs_that_were_seen_once_are_drawn_by_their_confidence_alone(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=20)
    content = json.loads((run / "datamap.json").read_text())
    content["map"]["variability"] = [0.0] * len(content["map"]["confidence"])
    (run / "datamap.json").write_text(json.dumps(content))
    section = pairs_section([RunFiles(run)])
    assert section is not None
    [figure] = section.figures
    [trace] = figure.traces
    assert trace["y"] == sorted(content["map"]["confidence"]) and "which was once" in figure.text
