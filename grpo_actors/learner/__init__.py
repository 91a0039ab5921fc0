"""ACTOR: takes batches of groups, updates the policy, publishes versions, writes checkpoints."""
