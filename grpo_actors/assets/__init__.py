"""The embedded default model and what made it: `python -m grpo_actors.assets.make_tiny`."""

from pathlib import Path

#: Folder of the tiny model: what ``model_name = "tiny"`` stands for.
TINY = Path(__file__).parent / "tiny"
