"""A user's own rewards and environments, which run in child processes because they may hang or crash."""
