"""The loop, its state, checkpoints, metrics and trackers."""
