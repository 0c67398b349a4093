"""A run's folder: lock, config.yaml, state, metrics.jsonl."""
