"""GRPO training of language models on MLX, as actors.

Importing the package loads no MLX; on a Linux CPU it puts a fast BLAS into the process, which must be
there before anything else imports ``mlx.core`` (`backend`).
"""

import sys

from grpo_actors.backend import (
    allow_varying_shapes,
    keep_kernels,
    keep_torch_out_of_transformers,
    load_fast_blas,
)
from grpo_actors.process import hide_warnings_of_others

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:
    # Python is locating ``python -m grpo_actors.…``: a command, or a child process of one. This comes before all that
    # its module imports. A program that imports the package keeps its warnings, and transformers its PyTorch.
    hide_warnings_of_others()
    keep_torch_out_of_transformers()
load_fast_blas()
allow_varying_shapes()
keep_kernels()
