"""Models: load, sample, score, train. No sockets. Outside it, only parts that make, write or measure models use mlx.nn or mlx_lm."""
