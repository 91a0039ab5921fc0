"""Load the package before any test module imports mlx.core: the fast BLAS must come first."""

import grpo_actors.objective  # noqa: F401
