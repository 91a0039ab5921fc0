"""A run on disk: file names, lock, checkpoints, worker decisions, and the check that settings may continue a run."""
