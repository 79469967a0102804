"""The fault campaign: `make faults`. Seeded trials of real runs, each of which one fault is done to; README.md's table.

    __main__    the command                      kinds      the table of faults
    campaign    which trials, two at a time      trial      one trial's folder, commands and words
    bases       undisturbed runs to compare with verdict    what became of a trial
    commands    processes: start, wait, end      report     what is printed and written
    moments     when a fault strikes             preload.c  a slow or failing disk, a clock that jumps
The faults themselves: signals, damage, disks, clocks, mistakes, crowds, leftovers, places.
"""
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

# conftest.py and namespaces.py, as pytest finds them
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS / "distributed")) if folder not in sys.path]
