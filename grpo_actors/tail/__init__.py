"""Watch a run on a terminal."""
