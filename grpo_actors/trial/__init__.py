"""The trial before a run: pose, sample, score and train once, in one process, and say what to change first."""
