"""`dpo-dist run -m`: multirun.py (Hydra's side) → groups.py (jobs that share a reference) → run_local.py with
processes.py, or run_slurm.py → results.py, page.py."""
