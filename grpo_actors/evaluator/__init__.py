"""Score checkpoints on held-out problems: one run as it trains, or any number of checkpoints afterwards."""
