"""A user's own rewards and environments, each run in a child process that may hang or crash."""
