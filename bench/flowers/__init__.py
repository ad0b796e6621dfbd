"""Fine-tuning to an accuracy, ours beside torch's: `python -m bench.flowers`, see `run`."""
