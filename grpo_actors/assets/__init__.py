"""Hold the embedded default model and the script that made it: `python -m grpo_actors.assets.make_tiny`."""

from pathlib import Path

#: Folder of the tiny model, the value of ``model_name = "tiny"``.
TINY = Path(__file__).parent / "tiny"
