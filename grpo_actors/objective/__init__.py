from grpo_actors.backend import load_fast_blas

load_fast_blas()
