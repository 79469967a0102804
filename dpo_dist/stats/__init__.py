"""Statistics in plain numpy: intervals, tests and their corrections, AUC, calibration. Nothing here knows of models or
files."""
