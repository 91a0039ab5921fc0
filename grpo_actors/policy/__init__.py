"""Models: load, sample, score, train, save. The only place that knows mlx.nn and mlx_lm; no sockets."""
