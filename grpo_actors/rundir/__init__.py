"""A run on disk: the names of its files, its lock, and whether given settings may continue it."""
