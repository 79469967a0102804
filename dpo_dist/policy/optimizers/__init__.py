"""The optimizers. Each file's `make_optimizer` makes one; their keys, rules and memory are in config/optimizers.py."""
