"""What a run's files say, in plain words: each a note of a level, from good to alarming."""
from __future__ import annotations

from dpo_dist.report.audit_findings import by_gravity
from dpo_dist.report.data_map import pair_counts
from dpo_dist.report.held_out import EQUAL, POLICY, SHORTER, accuracies
from dpo_dist.report.run_files import Row, RunFiles, number
from dpo_dist.report.shown import counted, percent, plain, share

STANDS = {"good": "above what needs no training", "error": "below what needs no training",
          "warning": "not told apart from what needs no training"}
FALL_BOUND = 0.25                        # nats a token, at which the guard speaks too (run/guard.py)
Note = tuple[str, str]                   # (good, info, warning or error; what there is to say)


def verdict(run: RunFiles) -> list[Note]:
    """What a colleague should know first."""
    last = run.last_evaluation or {}
    return [*(_accuracy(last) or _accuracy_alone(run)), *_displacement(run, last), *_calibration(last), *_slices(last),
            *_lengths(run), *_judge(run), *_guard(run), *_audit(run), *_pairs(run), *_unread(run)]


def _accuracy(last: Row) -> list[Note]:
    found = accuracies(last)
    ours, shorter, _ = (found.pop(name, None) for name in (POLICY, SHORTER, EQUAL))
    if ours is None:
        return []
    low, high = number(ours.get("low")), number(ours.get("high"))
    stands: dict[str, list[str]] = {}                    # how it stands to its baselines: which are so
    for name, baseline in found.items():
        other = number(baseline.get("value")) or 0.0
        against = f"“{' '.join(name.split())}” is right in {percent(other)}"
        above, below = low is not None and low > other, high is not None and high < other
        stands.setdefault("good" if above else "error" if below else "warning", []).append(against)
    notes: list[Note] = [(level, f"Held-out accuracy {share(ours)} is {STANDS[level]}: {'; '.join(against)}.")
                         for level, against in stands.items()]
    if shorter is not None and (high_of := number(shorter.get("high"))) is not None and high_of < (low or 0.0):
        notes.append(("warning", f"Where the chosen answer is the shorter one, accuracy is only "
                                 f"{percent(shorter['value'])}: part of the rest is length."))
    return notes


def _accuracy_alone(run: RunFiles) -> list[Note]:
    """Of a run whose evaluations are known by their means only."""
    found = [value for row in run.held_out if (value := number(row.get("rewards/accuracies"))) is not None]
    if len(found) < 2:
        return []
    pairs = plain((run.passport.get("eval_pairs") or {}).get("count"))
    return [("info", f"Held-out accuracy went from {percent(found[0])} to {percent(found[-1])}, on {pairs} pairs.")]


def _displacement(run: RunFiles, last: Row) -> list[Note]:
    moved = number((last.get("displacement") or {}).get("chosen_per_token"))
    if moved is None and run.held_out:
        moved = number(run.held_out[-1].get("reference/chosen_drift_per_token"))
    if moved is None or moved == 0:
        return []
    if moved > 0:
        return [("good", f"The chosen answers became likelier, by {plain(moved)} nats a token.")]
    if -moved < FALL_BOUND:
        return [("info", f"The chosen answers became a little less likely, by {plain(-moved)} nats a token.")]
    return [("warning", f"Even the chosen answers became less likely, by {plain(-moved)} nats a token (displacement): "
                        "loss=rpo, a lower learning rate or a larger beta hold them.")]


def _calibration(last: Row) -> list[Note]:
    found = last.get("calibration") or {}
    if number(found.get("ece")) is None:
        return []
    better = number(found.get("calibrating_beta"))
    hint = f" A beta of {plain(better)} would calibrate them, with the policy as it is." if better is not None else ""
    chance = number(found.get("ece_by_chance"))
    if chance is not None and found["ece"] <= chance:
        return [("good", f"The implied probabilities are calibrated, as far as {plain(last.get('pairs'))} pairs show: "
                         f"off by {percent(found['ece'])} on average (ECE).")]
    return [("warning" if found["ece"] > 0.1 else "info", f"The implied probabilities are off by "
             f"{percent(found['ece'])} on average (ECE).{hint}")]


def _slices(last: Row) -> list[Note]:
    flagged = [f"{one.get('by')} {one.get('value')} ({percent((one.get('accuracy') or {}).get('value'))})"
               for one in last.get("slices") or [] if one.get("flagged")]
    more = f" and {len(flagged) - 4} more" if len(flagged) > 4 else ""
    return [("warning", f"Accuracy differs from the rest in: {', '.join(flagged[:4])}{more}.")] if flagged else []


def _lengths(run: RunFiles) -> list[Note]:
    before, after = ((run.generations or {}).get(when) or {} for when in ("before", "after"))
    if not before or not after:
        return []
    grown = (number(after.get("tokens_low")) or 0) > (number(before.get("tokens_high")) or float("inf"))
    mean, at_first = (plain(found.get("tokens_mean")) for found in (after, before))
    words = f"Sampled answers have {mean} tokens, before training {at_first}"
    notes: list[Note] = [("warning" if grown else "info", words + (": they grew." if grown else "."))]
    again = [number(found.get("repetition")) or 0.0 for found in (before, after)]
    if again[1] > max(0.1, 2 * again[0]):
        notes.append(("warning", f"Sampled answers repeat themselves: {percent(again[1])}, before training "
                                 f"{percent(again[0])}."))
    return notes


def _judge(run: RunFiles) -> list[Note]:
    won = (run.judge or {}).get("win_rate")
    if not won or number(won.get("value")) is None:
        return []
    low, high = number(won.get("low")), number(won.get("high"))
    level = "good" if low is not None and low > 0.5 else "error" if high is not None and high < 0.5 else "warning"
    fair = (run.judge or {}).get("length_controlled")
    return [(level, f"By the judge it wins {share(won)}" + (f", at equal length {share(fair)}." if fair else "."))]


def _guard(run: RunFiles) -> list[Note]:
    if not run.guard:
        return []
    first = run.guard[0]
    level = "error" if any(event.get("action") == "stop" for event in run.guard) else "warning"
    return [(level, f"The guard spoke {counted(len(run.guard), 'time')}, first at step {first.get('step')} "
                    f"({first.get('guard')}): {first.get('message')}")]


def _audit(run: RunFiles) -> list[Note]:
    if run.audit is None:
        return []
    alarms = [f for f in by_gravity(run.audit) if f.get("severity") in ("error", "warning")]
    if not alarms:
        return [("good", "The audit of the data raised no alarm.")]
    level = "error" if alarms[0]["severity"] == "error" else "warning"
    kinds = ", ".join(f"{f.get('kind')} ({percent(f.get('share'))})" for f in alarms[:5])
    more = f" and {len(alarms) - 5} more" if len(alarms) > 5 else ""
    return [(level, f"The audit of the data raised {counted(len(alarms), 'alarm')}: {kinds}{more}.")]


def _pairs(run: RunFiles) -> list[Note]:
    counts = pair_counts(run.datamap or {})
    flipped = f"; about {counts['suspects']:,} labels look flipped" if counts["suspects"] else ""
    return [("info", f"{counted(counts['never_learned'], 'pair was', 'pairs were')} never learned, "
                     f"{counts['forgotten']:,} learned and lost again{flipped}.")] if any(counts.values()) else []


def _unread(run: RunFiles) -> list[Note]:
    """The files have all been read by now: what is shown last is made first."""
    _ = run.training, run.guard, run.samples
    return [("info", f"{counted(n, 'line')} of {name} could not be read (half written) and {'is' if n == 1 else 'are'} "
                     "left out.") for name, n in run.unread.items()]
