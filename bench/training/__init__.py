"""A training step, ours beside torch's: `python -m bench.training`, see `run`."""
