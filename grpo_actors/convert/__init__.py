"""Other people's files, and model folders that mlx-lm loads."""
