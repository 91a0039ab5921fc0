"""GRPO training of language models on MLX, as actors.

Importing this package costs nothing: the back end (``mlx``) is first touched by
``grpo_actors.policy`` and ``grpo_actors.objective``.
"""

__version__ = "0.1.0"
