"""Rollout workers, which sample groups with the old policy, score them and send them to the learner."""
