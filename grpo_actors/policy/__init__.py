"""Models: load, sample, score, train, save. The only place that uses mlx.nn and mlx_lm; it has no sockets."""
