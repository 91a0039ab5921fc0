"""Groups of processes that compute together (ranks): a learner's, which share updates, and a worker's, which share a model."""
