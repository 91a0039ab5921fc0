"""Compile the kernels of a run ahead, in several processes: MLX compiles them on CUDA one after another, for seconds each."""
