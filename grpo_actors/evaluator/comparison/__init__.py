"""Any number of checkpoints on the same problems: answers, statistics, a table, a picture. No live run, no socket."""
