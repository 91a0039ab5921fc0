"""Problems, rewards and environments, without MLX and ZeroMQ."""
