"""Rollout workers: sample groups with the old policy, score them, send them to the learner."""
