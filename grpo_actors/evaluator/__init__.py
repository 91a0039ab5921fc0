"""Score checkpoints on held-out problems: those of a run while it trains, or any number of them afterwards."""
