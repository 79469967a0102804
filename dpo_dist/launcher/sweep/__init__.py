"""`dpo-dist run -m`: multirun.py (Hydra) → groups.py (jobs that share a reference) → run_local.py with processes.py, or
run_slurm.py → results.py; then dpo_dist.report as a process."""
