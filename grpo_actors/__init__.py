"""GRPO training of language models on MLX, as actors.

Importing the package loads no MLX; on a Linux CPU it puts a fast BLAS into the process, which must be
there before anything else imports ``mlx.core`` (`backend`).
"""

from grpo_actors.backend import let_shapes_vary, load_fast_blas

__version__ = "0.1.0"

load_fast_blas()
let_shapes_vary()
