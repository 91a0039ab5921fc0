"""Convert models of other formats into model folders that mlx-lm loads."""
