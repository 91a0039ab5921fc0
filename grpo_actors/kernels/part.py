"""Run one part: ``python -m grpo_actors.kernels.part NAME SETTINGS``, started by `stage`; SETTINGS is a config.json."""

import sys

from grpo_actors.process import follow_parent, run_command


def main() -> int:
    """Run the part."""
    follow_parent()
    _, name, settings = sys.argv
    from grpo_actors.config import Config  # noqa: PLC0415 - it must end with its parent while it imports, too
    from grpo_actors.kernels.parts import PARTS, Work  # noqa: PLC0415

    PARTS[name](Work(Config.model_validate_json(settings)))
    return 0


if __name__ == "__main__":
    run_command(main)
