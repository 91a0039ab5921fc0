"""ACTOR: the learner takes batches of groups, updates the policy, publishes versions and writes checkpoints."""
