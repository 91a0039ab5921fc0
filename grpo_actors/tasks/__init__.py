"""Problems and their rewards: no MLX, no ZeroMQ."""
