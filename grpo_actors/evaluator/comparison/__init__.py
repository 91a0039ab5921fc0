"""Compare any number of checkpoints on the same problems: answers, statistics, table, plot. No live run, no socket."""
