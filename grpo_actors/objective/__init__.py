"""The mathematics of GRPO and its relatives: pure functions on arrays. No model, no socket."""
