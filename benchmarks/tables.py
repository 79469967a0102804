"""Writes the tables of README.md and docs/gpu.md, from the committed results and from conf/experiment/: tables.py
[--check]. With --check, 1 where they differ."""
from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from aligned_table import aligned_table
from faults_table import faults_table
from known_tables import data_table, result_table
from save_table import save_table
from trl_verdicts import tokens_tables

from dpo_dist.config.compose import choices, compose, conf_dir

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
GPU_PAGE = HERE.parent / "docs" / "gpu.md"
SPEED = "<!-- speed: written by benchmarks/tables.py -->", "<!-- end of speed -->"
TOKENS = "<!-- tokens: written by benchmarks/tables.py -->", "<!-- end of tokens -->"
GPU = "<!-- gpu: written by benchmarks/tables.py -->", "<!-- end of gpu -->"
REAL = "<!-- real model: written by benchmarks/tables.py -->", "<!-- end of real model -->"
ALIGNED = "<!-- aligned: written by benchmarks/tables.py -->", "<!-- end of aligned -->"
FAMILIES = "<!-- families: written by benchmarks/tables.py -->", "<!-- end of families -->"
RECIPES = "<!-- recipes: written by benchmarks/tables.py -->", "<!-- end of recipes -->"
OPTIMIZERS = "<!-- optimizers: written by benchmarks/tables.py -->", "<!-- end of optimizers -->"
DATA = "<!-- data: written by benchmarks/tables.py -->", "<!-- end of data -->"
RESULT = "<!-- result: written by benchmarks/tables.py -->", "<!-- end of result -->"
SAVES = "<!-- saves: written by benchmarks/tables.py -->", "<!-- end of saves -->"
FAULTS = "<!-- faults: written by benchmarks/tables.py -->", "<!-- end of faults -->"
ROWS = {"long": "long shared prompts", "uneven": "short uneven rows",
        "ratings": "four rated responses a prompt, all six pairs"}


def main(check: bool) -> int:
    changed = [file for file, marks, content in ((README, SPEED, tables()), (README, GPU, gpu_table()),
                                                 (README, REAL, real_table()),
                                                 (README, ALIGNED, aligned_table(read("real"))),
                                                 (README, FAMILIES, family_table()), (README, RECIPES, recipe_table()),
                                                 (README, OPTIMIZERS, optimizer_table(read("optimizers"))),
                                                 (README, TOKENS, tokens_tables(read("trl_tokens"))),
                                                 (README, DATA, data_table(read("audit"))),
                                                 (README, RESULT, result_table(
                                                     *map(read, ("flipped_labels", "displacement", "frontier")))),
                                                 (README, FAULTS, faults_table(read("faults"))),
                                                 (README, SAVES, save_table(read("save_stall"))),
                                                 (GPU_PAGE, GPU, gpu_table()))
               if filled(file, marks, content, check)]
    return int(check and bool(changed))


def filled(file: Path, marks: tuple[str, str], content: str, check: bool) -> bool:
    """Whether the text between the marks is another; it is replaced unless this is a check."""
    text = file.read_text()
    before, rest = text.split(marks[0])
    _, after = rest.split(marks[1])
    wanted = f"{before}{marks[0]}\n{content}\n{marks[1]}{after}"
    if not check:
        file.write_text(wanted)
    return wanted != text


def tables() -> str:
    return "\n\n".join([step_table(read("step_time")), other_table(read("memory"), read("scaling")),
                        run_table(read("start"), read("tokenizing"), read("sweep"), read("ahead"), read("sizing"))])


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def step_table(results: dict[str, Any]) -> str:
    rows = results["rows"]

    def line(label: str, value: Any) -> str:
        return f"| {label} | " + " | ".join(value(rows[kind]) for kind in ROWS) + " |"

    def ratio(name: str, digits: int = 2) -> Any:
        return lambda row: f"{row[name]:.{digits}f}"

    return "\n".join([
        "| medians of ratios over " + f"{results['rounds']} rounds | " + " | ".join(ROWS.values()) + " |",
        "|---|" + "---|" * len(ROWS),
        line("TRL's step over ours", ratio("TRL / ours")),
        line("TRL's step, reference precomputed, over ours", ratio("TRL precomputed / ours")),
        line("our DPO step over TRL's SFT step on the same pairs", ratio("ours / TRL sft")),
        line("our DPO step over our SFT step, unshared", ratio("ours / ours sft")),
        line("scoring the pairs over training on them", ratio("ours score / ours", 3)),
        line("peak memory over TRL's", ratio("peak memory, ours / TRL", 3)),
        line("share of a matrix product's rate, FLOPs of distinct tokens", ratio("share of the matrix-product rate")),
        line("losses: largest difference to TRL's", lambda row: f"{row[APART]:.1e}"),
        line("losses: largest difference to the unshared path's", lambda row: f"{row[APART_UNSHARED]:.1e}"),
    ])


APART = "largest difference of the losses to TRL's"
APART_UNSHARED = "largest difference of the losses to the unshared path's"


def other_table(memory: dict[str, Any], scaling: dict[str, Any]) -> str:
    growth, planning = memory["largest over smallest vocabulary"]["one_pack"], scaling["planning"]
    worst = {ranks: max(draw[ranks]["busiest"]["worst"] for draw in scaling["balance"].values())
             for ranks in ("2 ranks", "8 ranks")}
    measured = max(entry["measured, seconds"]["worst"] for entry in scaling["measured"].values())
    return "\n".join([
        "| | measured |", "|---|---|",
        f"| peak memory of a step, vocabulary 131,072 over 4,096, {memory['completion_tokens']:,} completion tokens; "
        "weights, gradients and optimizer state taken off (and the strictest reading: see `memory.py`) | "
        f"{growth['step_mib']:.2f} ({growth['step_and_gradients_mib']:.2f}) |",
        "| busiest over mean rank, 64 pairs of 8 to 2,048 tokens, planned cost: worst of 200 draws from each of "
        f"{len(scaling['balance'])} distributions, on 2 and 8 ranks | {worst['2 ranks']:.3f}, {worst['8 ranks']:.3f} |",
        f"| the same, measured on 2 ranks: worst step | {measured:.3f} |",
        f"| the plan of {planning['pairs']:,} pairs on 8 ranks, all steps of an epoch | "
        f"{planning['training, 8 ranks']['seconds']:.1f} s, {planning['training, 8 ranks']['bytes_a_pair']:.0f} bytes "
        "a pair |",
        *growth_lines(scaling["steps"]),
    ])


def growth_lines(steps: dict[str, list[dict[str, Any]]]) -> list[str]:
    def ends(part: str, what: str, unit: str) -> tuple[str, str]:
        first, last = steps[part][0], steps[part][-1]
        return f"{first[what]} and {last[what]}", f"{first[unit]:.0f} and {last[unit]:.0f}"

    pairs, a_pair = ends("pairs", "pairs", "milliseconds_a_pair")
    lengths, a_token = ends("lengths", "sequence_tokens", "microseconds_a_token")
    one, two = steps["ranks"]
    return [f"| a step of {pairs} pairs of {steps['pairs'][0]['sequence_tokens']} tokens: milliseconds a pair | "
            f"{a_pair} |",
            f"| sequences of {lengths} tokens: microseconds a token | {a_token} |",
            f"| {one['pairs']} pairs of {one['sequence_tokens']} tokens on 2 ranks over 1: pairs a second "
            f"| {one['seconds_a_step'] / two['seconds_a_step']:.2f} |"]


def run_table(start: dict[str, Any], tokenizing: dict[str, Any], sweep: dict[str, Any], ahead: dict[str, Any],
              sizing: dict[str, Any]) -> str:
    one, two = start["1 processes"]["now"], start["2 processes"]["now"]
    cached, beside, ratio = ahead["cached"], ahead["ahead"], sweep["sweep / separate"]
    rates, cpu = tokenizing["rows a second"], tokenizing["rows a second of the processor"]
    over = tokenizing["ours / TRL"]
    order = sizing["in_another_order_of_cpu_time"]
    return "\n".join([
        "| whole runs | measured |", "|---|---|",
        "| from the command `dpo-dist train` to its first step, golden model, 1 and 2 processes: seconds | "
        f"{one:.1f} and {two:.1f} |",
        f"| {tokenizing['rows']:,} chats of about 900 tokens, from a file to token ids on disk, on 1 and 2 cores: rows "
        f"a second (TRL's preparation) | {rates['ours, 1']} and {rates['ours, 2']} ({rates['TRL, 1']} and "
        f"{rates['TRL, 2']}) |",
        f"| the same, rows a second of the processor | {cpu['ours, 1']} and {cpu['ours, 2']} ({cpu['TRL, 1']} and "
        f"{cpu['TRL, 2']}) |",
        f"| the same over TRL's, 1 and 2 cores, in one round | {over['1']:.2f} and {over['2']:.2f} |",
        "| a 3 × 2 sweep over six runs with a live reference: seconds, seconds on the processor, counted forwards and "
        f"backwards | {ratio['wall']:.2f}, {ratio['processor']:.2f}, {ratio['counted']:.2f} |",
        f"| the first step of a run over {ahead['pairs']} pairs, scored before and ahead of training: seconds from the "
        f"start | {cached['start_to_first_step_seconds']:.1f} and {beside['start_to_first_step_seconds']:.1f} |",
        f"| memory a rank that `plan` predicts, {len(sizing['runs'])} runs: largest error | "
        f"{sizing['worst_memory_error']:.1%} |",
        f"| step times that `plan` predicts: pairs of runs in the wrong order (CPU seconds) | {len(order)} of "
        f"{sizing['pairs_of_runs']} |",
    ])


def optimizer_table(results: dict[str, Any]) -> str:
    """Of the demo's model: loss curves at one learning rate, and bytes of state."""
    steps = next(iter(results["runs"].values()))["loss"]
    lines = [f"| `{name}` | " + " | ".join(f"{loss:.3f}" for loss in of["loss"].values())
             + f" | {of['held_out_loss']:.3f} | {of['held_out_accuracy']:.2f} | {of['state_bytes_a_parameter']:.2f} |"
             for name, of in results["runs"].items()]
    return "\n".join([
        "| the demo's model: loss at step | " + " | ".join(steps)
        + " | held-out loss | held-out accuracy | bytes of state a parameter |",
        "|---|" + "---|" * (len(steps) + 3), *lines])


REFUSALS = {"encoder-decoder": "is an encoder-decoder", "not causal": "so it is not causal",
            "takes no text without an image": "takes no text alone"}


def family_table() -> str:
    """A line for each outcome of benchmarks/families.py, with the families' names as in config.json's model_type."""
    results = read("families")
    families: dict[str, Any] = results["families"]

    def line(label: str, outcome: str, why: Any = lambda why: True) -> str:
        names = [name for name, found in families.items() if found["outcome"] == outcome and why(found.get("why", ""))]
        return f"| {label} | {len(names)} | {', '.join(names)} |"

    def worst(outcome: str) -> str:
        errors = [f["logp_error"] for f in families.values() if f["outcome"] == outcome and f["dtype"] == "float64"]
        return f"{max(errors):.0e}"

    def other(why: str) -> bool:
        return not any(part in why for part in REFUSALS.values())

    return "\n".join([
        f"| transformers {results['transformers']} | | `model_type` |", "|---|---|---|",
        line(f"packed, prompts shared; log-probs within {worst('packed')} nats of the model's own forward in fp64",
             "packed"),
        line(f"padded rows; within {worst('padded')} nats", "padded"),
        *(line(f"refused: {label}", "refused", lambda why, part=part: part in why) for label, part in REFUSALS.items()),
        line("refused: other reasons, told in the message", "refused", other),
        line("no tiny model of it could be made here, so step 0 decides", "not built"),
    ])


def recipe_table() -> str:
    """A line for each experiment that names the source of its figures."""
    lines = ["| `experiment=` | start, data | loss | learning rate | pairs a step, epochs | tokens | source |",
             "|---|---|---|---|---|---|---|"]
    for name in choices("experiment"):
        source = re.search(r"^# Source: (.+?)(?: \(arXiv (.+)\))?$",
                           (conf_dir() / "experiment" / f"{name}.yaml").read_text(), re.M)
        if source is None:
            continue
        config = compose([f"experiment={name}"])
        data, optim, train = config.data, config.optim, config.train
        start = ", ".join(dict.fromkeys([config.model.path, *(d.path for d in data.train)]))
        margin = f", gamma {config.loss.simpo_gamma:g}" if config.loss.simpo_gamma else ""
        floor = f" to {optim.min_lr_ratio:.0%}" if optim.min_lr_ratio else ""
        lr = f"{optim.lr:.0e}".replace("e-0", "e-")
        paper = f"; [{source[2]}](https://arxiv.org/abs/{source[2].split(',')[0]})" if source[2] else ""
        lines.append(f"| `{name}` | {start} | {config.loss.name}, beta {config.loss.beta:g}{margin} | {lr}, "
                     f"{optim.schedule}{floor} | {train.pairs_per_step}, {train.epochs:g} | {data.max_length:,} | "
                     f"{source[1]}{paper} |")
    return "\n".join(lines)


def real_table() -> str:
    """Whole runs of a real model beside TRL's: a line for each variant, and one for each ratio; that none was measured,
    where there are no results."""
    if not (HERE / "results" / "real_model.json").exists():
        return "Whole runs of a real model beside TRL's: not measured yet. `benchmarks/real_model.py` does it."
    results = read("real_model")
    rounds, setup = list(results["rounds"].values()), results["setup"]

    def middle(name: str, what: str, digits: int) -> str:
        values = [one[name][what] for one in rounds if what in one.get(name, {})]
        return f"{statistics.median(values):.{digits}f}" if values else "-"

    runs = {name: None for one in rounds for name in one}
    figures = (("seconds", 0), ("processor_seconds", 0), ("peak_gib", 1), ("held_out_accuracy", 3),
               ("held_out_loss", 4))
    told = results["summary"].items()
    tried = results["TRL's settings, seconds of a step"]
    at_once = sorted({int(name.split()[2]) for name in tried}, reverse=True)
    headings = [f"{n} pair{'s' * (n > 1)} at once" for n in at_once]

    def seconds(processes: int, pairs: int) -> str:
        value = tried.get(f"{processes} processes, {pairs} pairs at once")
        return "-" if value is None else f"{value:.1f}"

    return "\n".join([
        f"{setup['pairs']} pairs of {results['tokens']:,} tokens ({results['tokens_as_two_sequences']:,} with the "
        f"prompt before each answer), {setup['steps']} steps, {setup['cores']} cores; "
        f"medians over rounds ({len(rounds)}); {setup['held_out']} held-out pairs, judged by `dpo-dist eval`.", "",
        "| TRL, live reference: seconds of a step | " + " | ".join(headings) + " |",
        "|---|" + "---|" * len(at_once),
        *(f"| {n} process{'es' * (n > 1)} | " + " | ".join(seconds(n, pairs) for pairs in at_once) + " |"
          for n in sorted({int(name.split()[0]) for name in tried})), "",
        "| from command to exported model | seconds | on the processor | peak, GiB | held-out accuracy | loss |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join([name, *(middle(name, what, digits) for what, digits in figures)]) + " |" for name in runs),
        "", "| medians of ratios | seconds | on the processor | peak memory | losses apart |", "|---|---|---|---|---|",
        *(f"| {name} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['peak_gib']:.2f} | "
          + (f"{row['losses apart']:.1e}" if "losses apart" in row else "-") + " |" for name, row in told)])


def gpu_table() -> str:
    """A line for each run on a GPU; that none was measured, where there are no results."""
    lines = []
    for file in sorted((HERE / "results").glob("gpu-*-runs.json")):
        results = json.loads(file.read_text())
        trl = {(row["model"], row["length"], row["case"]): row for row in results["rows"]
               if row["case"].startswith("trl") and "step_seconds" in row}
        for row in results["rows"]:
            if row["case"] == "ours" and "step_seconds" in row:
                lines.append(gpu_line(results["card"], row, trl))
    if not lines:
        return "On a GPU: not measured yet. `benchmarks/gpu.sh` is ready for one."
    return "\n".join([
        "| card | model, pair, options | step, s | MFU (of a product's rate) | peak, predicted, GiB | TRL live, "
        "precomputed over ours |",
        "|---|---|---|---|---|---|", *lines])


def gpu_line(card: str, row: dict[str, Any], trl: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    ratios = [trl.get((row["model"], row["length"], f"trl {way}")) for way in ("live", "precomputed")]
    beside = ", ".join(f"{entry['step_seconds'] / row['step_seconds']:.2f}" if entry else "-" for entry in ratios)
    share = f"{row['mfu']:.2f} ({row['of_product']:.2f})" if "mfu" in row else "-"
    return (f"| {card} | {row['model']}, {row['length']:,} tokens, prompt {row['prompt_share']:.0%}, "
            f"`{row['overrides']}` | {row['step_seconds']:.2f} | {share} | {row['peak_gib']}, {row['predicted_gib']} | "
            f"{beside} |")


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
