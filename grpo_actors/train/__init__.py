"""The commands that train a model, or try the run first."""
