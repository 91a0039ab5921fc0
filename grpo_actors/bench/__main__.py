"""The bench's command line. Slow imports happen after the arguments are parsed."""

import argparse
import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from grpo_actors.options import add_overrides
from grpo_actors.process import run_command

PROGRAM = "python -m grpo_actors.bench"
#: Part -> (its module, its help text).
PARTS = {
    "rollout": ("rollout", "sampling: tokens/s, milliseconds a step"),
    "learner": ("learner", "an update: seconds, tokens/s, peak memory"),
    "weights": ("publication", "a weights version: time from the learner until the worker processes hold it"),
    "end-to-end": ("end_to_end", "a whole run: seconds an update, and which actor waits how long"),
    "exchange": (
        "exchange",
        "many simulated workers at one learner: messages/s, the exchange's share of a core",
    ),
    "startup": ("startup", "start-up: time to the command line, the first update and a ready worker"),
}
RUN = "a real job from its launch to its exit: start-up, updates, evaluations, checkpoints, memory of each process"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Return the command line's parser; `Options` checks the counts."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Measure how fast the parts of a run are on this machine, and how close to its limits.",
    )
    parts = command.add_subparsers(dest="part", required=True, metavar="PART")
    _add_run(parts.add_parser("run", help=RUN, description=RUN))
    each = {name: parts.add_parser(name, help=text, description=text) for name, (_, text) in PARTS.items()}
    for part in each.values():
        _add_common(part)
    for name in ("rollout", "learner", "end-to-end"):
        _add_lengths(each[name])
    rollout = each["rollout"].add_argument
    rollout("--places", type=int, metavar="N", help="completions decoded at the same time (default: all)")
    rollout(
        "--processes", type=int, default=1, metavar="N", help="processes at the same time; their rates add up"
    )
    rollout(
        "--against", choices=["mlx-lm"], help="also sample with mlx-lm's BatchGenerator, in alternate rounds"
    )
    weights = each["weights"].add_argument
    weights("--fetchers", type=int, default=1, metavar="N", help="worker processes (default: 1)")
    weights("--chunks", action="store_true", help="send versions over the socket, as to another host")
    # An update has a group of each worker, so that all have work.
    each["exchange"].add_argument(
        "--workers", type=int, default=256, metavar="N", help="simulated workers (default: 256)"
    )
    each["exchange"].set_defaults(groups=256)
    each["end-to-end"].add_argument(
        "--warmup",
        type=int,
        default=2,
        metavar="N",
        help="updates before the measured ones (default: 2)",
    )
    return command


def _add_lengths(part: argparse.ArgumentParser) -> None:
    lengths = part.add_mutually_exclusive_group()
    lengths.add_argument(
        "--lengths",
        default="equal",
        metavar="NAME_OR_FILE",
        help="lengths of completions: equal (default), log-normal, recorded (those of a real run, as shares of --tokens), "
        "or a file with a JSON list of lengths; unless equal, rollout and learner have prompts of half to all of their tokens",
    )
    lengths.add_argument(
        "--ragged",
        action="store_const",
        const="log-normal",
        dest="lengths",
        help="short for --lengths log-normal",
    )


def _add_run(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    add("--config", required=True, metavar="FILE", help="settings of the job, as for grpo train")
    add_overrides(part)
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the figures, the curves and all samples of memory here",
    )
    add("--folder", type=Path, metavar="DIR", help="new folder to keep the run in (default: a temporary one)")
    add(
        "--interrupt-after",
        type=int,
        metavar="N",
        help="press Ctrl-C after update N, and measure the time to the exit",
    )


def _add_common(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    model = part.add_mutually_exclusive_group()
    model.add_argument("--model", default="tiny", metavar="NAME_OR_PATH", help="as model.model_name")
    model.add_argument(
        "--random", metavar="NAME", help="random weights of this architecture, for example qwen2.5-0.5b"
    )
    add("--keep", metavar="DIR", help="with --random: folder to keep the model in, for later calls too")
    add("--dtype", default="auto", help="as model.dtype")
    add("--prompt-tokens", type=int, metavar="N", help="tokens of a prompt (default: 64)")
    add("--tokens", type=int, default=64, metavar="N", help="tokens of a completion (default: 64)")
    add("--groups", type=int, default=8, metavar="N", help="groups in a batch (default: 8)")
    add("--generations", type=int, default=8, metavar="N", help="completions of a group (default: 8)")
    add("--rounds", type=int, default=5, metavar="N", help="measured rounds (default: 5)")
    add_overrides(part)
    add("--json", action="store_true", help="print JSON")


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Parse the command line, measure, print."""
    given = vars(parser(prog).parse_args(arguments))
    if given["part"] == "run":
        from grpo_actors.bench.job import measure  # noqa: PLC0415 - pydantic costs more than --help may take

        return measure(
            given["config"], given["overrides"], given["folder"], given["json"], given["interrupt_after"]
        )
    from grpo_actors.bench.options import Options  # noqa: PLC0415 - pydantic costs more than --help may take

    options = Options(**{**given, "overrides": tuple(given["overrides"])})
    from grpo_actors.bench.figures import as_json, as_table  # noqa: PLC0415
    from grpo_actors.bench.peak_rates import description  # noqa: PLC0415 - and MLX far more

    part = importlib.import_module(f"grpo_actors.bench.{PARTS[options.part][0]}")
    with _model(options.model, options.random, options.dtype, options.keep) as model_name:
        figures = part.measure(options, model_name)
    if options.json:
        print(as_json(figures, description(), asdict(options)))
    else:
        print(as_table(figures, description()))
    return 0


@contextlib.contextmanager
def _model(name: str, architecture: str | None, dtype: str, keep: str | None) -> Iterator[str]:
    """Yield the value for model.model_name; makes the random model if an architecture is given."""
    if architecture is None:
        yield name
        return
    from grpo_actors.bench.random_model import random_model  # noqa: PLC0415

    with random_model(architecture, dtype, keep) as folder:
        yield str(folder)


if __name__ == "__main__":
    run_command(main)
