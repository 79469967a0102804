"""`dpo-dist run -m`: multirun.py (Hydra's side) → groups.py (jobs that share a reference) → here.py with processes.py, or on_slurm.py →
results.py, page.py."""
