"""GRPO training of language models on MLX, as actors.

Importing the package loads no MLX; on a Linux CPU it puts a fast BLAS into the process, which must be
there before anything else imports ``mlx.core`` (`backend`).
"""

import os
import sys

from grpo_actors.search_path import reorder_for_command

# Whether Python is locating ``python -m grpo_actors.…``, or runs ``grpo``: a command, or a child process of one. This comes before all that
# its module imports. A program that imports the package keeps its search path and its warnings, and transformers its
# PyTorch.
_is_command = sys.argv[:1] == ["-m"] or [os.path.basename(name) for name in sys.argv[:1]] == ["grpo"]
_launch = os.path.join(os.path.dirname(__path__[0]), "launch.py")
if _is_command or [os.path.realpath(name) for name in sys.argv[:1]] == [os.path.realpath(_launch)]:
    reorder_for_command()

from grpo_actors.backend import (
    allow_varying_shapes,
    keep_kernels,
    keep_torch_out_of_transformers,
    load_fast_blas,
)
from grpo_actors.process import hide_warnings_of_others

__version__ = "0.1.0"

if _is_command:
    hide_warnings_of_others()
    keep_torch_out_of_transformers()
load_fast_blas()
allow_varying_shapes()
keep_kernels()
