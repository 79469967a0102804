"""What held-out pairs say of a policy: accuracy beside baselines, calibration, slices, displacement, RewardBench.

evaluate.py measures the pairs; this room reads what was measured, and needs no model for it.
"""
