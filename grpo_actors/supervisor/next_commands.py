"""What the user may do with the result of a run."""

from itertools import islice
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.consent import as_options, code_of_model, functions_of_caller, options_for
from grpo_actors.invocation import pasted
from grpo_actors.observe.view import RunView
from grpo_actors.rundir.checkpoints import best, find_checkpoints
from grpo_actors.rundir.outcome import continuing

#: Commands that are shown.
MOST = 3


def next_commands(run_dir: Path, config: Config, view: RunView) -> dict[str, str]:
    """Return label -> command, at most `MOST`, the likeliest first; `view` is what the run has shown."""
    kept, marked = find_checkpoints(run_dir), best(run_dir)
    commands = {}
    # A run that was complete before this start has no record of an update.
    if view.metrics is not None and view.total_updates is not None and view.update < view.total_updates:
        commands["continue it"] = continuing(run_dir, config)
    if kept:
        beaten = marked is not None and marked.update
        commands["chat with it"] = pasted("chat", run_dir)
        if not functions_of_caller(config):
            commands["score it"] = pasted(
                "eval",
                run_dir,
                *(["--compare", "base", "best"] if beaten else []),
                *options_for(config),
            )
        commands["take it along"] = pasted(
            *("export", run_dir, "--fuse", f"models/{run_dir.name}"),
            *as_options(code_of_model(config.model)),
        )
    return dict(islice(commands.items(), MOST))
