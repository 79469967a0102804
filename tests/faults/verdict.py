"""What became of a trial: recovered, stopped, lost, silent or hung."""
from __future__ import annotations

from dataclasses import dataclass

from .trial import Trial

RECOVERED, STOPPED, LOST, SILENT, HUNG = VERDICTS = ("recovered", "stopped", "lost", "silent", "hung")
FINE = (RECOVERED, STOPPED)
# what a word about damage may be
WORDS = ("damage", "checksum", "not as it was written", "set aside", "cannot be read", "error", "warning", "again",
         "missing", "not whole", "incomplete")


@dataclass(frozen=True)
class Verdict:
    name: str
    detail: str = ""

    @property
    def fine(self) -> bool:
        return self.name in FINE


def given_once(trial: Trial) -> Verdict:
    """The command is given under the fault. Where it stops, the fault is taken away and the command given again."""
    first = trial.again()
    if first.hung:
        return hung(trial)
    if first.code == 0:                                  # what it has made of the fault is judged as it lies there
        return ended(trial)
    return after_a_stop(trial)


def after_a_stop(trial: Trial) -> Verdict:
    """The newest start has stopped: cleanly, and so that the command goes on once the fault is gone."""
    first = trial.attempts[-1]
    why = first.errors[0] if first.errors else f"exit {first.code}, no error line"
    if not first.stopped_cleanly:
        why = f"unclean stop, exit {first.code}: {first.errors or first.terminal[-400:]}"
    trial.mend()
    last = trial.again()
    if last.hung:
        return hung(trial)
    if last.code != 0:
        return Verdict(LOST, f"{why}; and after the fault was gone, exit {last.code}: {last.terminal[-400:]}")
    if found := trial.differences():
        return Verdict(LOST if said_something(trial) else SILENT, f"{why}; then {'; '.join(found)}")
    return Verdict(STOPPED if first.stopped_cleanly else LOST, why)


def until_it_ends(trial: Trial, most: int = 4) -> Verdict:
    """The command is given again until it ends well, after kills."""
    for _ in range(most):
        if trial.attempts and trial.attempts[-1].hung:
            return hung(trial)
        if trial.attempts and trial.attempts[-1].code == 0:
            return ended(trial)
        trial.again()
    last = trial.attempts[-1]
    return ended(trial) if last.code == 0 else Verdict(LOST, f"exit {last.code}: {last.terminal[-600:]}")


def ended(trial: Trial) -> Verdict:
    """The newest start ended with 0: in the undisturbed run's results?"""
    found = trial.differences()
    if not found:
        tracebacks = [attempt for attempt in trial.attempts if attempt.traceback]
        return Verdict(LOST, f"recovered, with a traceback on the terminal: {tracebacks[0].terminal[-500:]}"
                       ) if tracebacks else Verdict(RECOVERED)
    return Verdict(LOST if said_something(trial) else SILENT, "; ".join(found))


def said_something(trial: Trial) -> bool:
    return any(attempt.said(*WORDS) for attempt in trial.attempts)


def hung(trial: Trial) -> Verdict:
    last = trial.attempts[-1]
    left = f"{len(last.left)} processes were left behind; " if last.left else ""
    return Verdict(HUNG, f"{left}after {last.seconds:.0f} s: {last.terminal[-400:]}")
