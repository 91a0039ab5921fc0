"""ACTOR: scores checkpoints on held-out problems, always the same ones, so that curves compare.

    python -m grpo_actors.evaluator CHECKPOINT … [--k 8] [--compare A B] [--plot FILE] [--answers FILE]

Alone it scores any number of checkpoints, as `comparison.alone` does it. In a run it scores the base model and then
every checkpoint as it appears in the run folder, and tells the learner. There a score that was computed once is kept
beside the checkpoint, and never computed again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from grpo_actors.atomic import whole_file
from grpo_actors.backend import submit_long_graphs
from grpo_actors.checkpoints import (
    EVALUATION_FILE,
    MANIFEST,
    Checkpoint,
    find_checkpoints,
    verify,
    write_json,
)
from grpo_actors.comparison.alone import Options, evaluate_alone
from grpo_actors.config import Config
from grpo_actors.episodes import episodes
from grpo_actors.evaluation import Score, evaluate, held_out
from grpo_actors.joining import Leaving, hello, introduce
from grpo_actors.messages import Beat, Bye, Evaluation, decode, encode, from_learner
from grpo_actors.policy.checkpoint import load_weights
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.process import StopRequest, bound_memory, enter_process, run_command
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import zmq_context

#: Longest wait for a message before the run folder is looked at again.
POLL_S = 0.2


# --- in a run -------------------------------------------------------------------------------------


class RunEvaluator:
    """Scores what appears in a run folder and reports it to the learner."""

    def __init__(
        self, run_dir: Path, control: ControlClient, config: Config, stop: StopRequest, beat_s: float
    ) -> None:
        self._run_dir = run_dir
        self._control = control
        self._config = config
        self._stop = stop
        self._beat_s = beat_s
        self._next_beat_s = 0.0
        self._dismissed = False
        #: Update, and when its manifest was written, of each checkpoint looked at.
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> None:
        """Until dismissed or asked to stop."""
        config = self._config
        task = load_task(config.data, seed=config.run.seed)
        policy = load_policy(config.model, seed=config.run.seed)
        problems = held_out(task, config, policy)
        rewards = chosen_rewards(config.reward.functions, task)
        with open_scorer(rewards, config.reward) as scorer, episodes(config, policy) as turns:

            def score() -> Score:
                return evaluate(policy, task, problems, config, scorer, episodes=turns, on_step=self._on_step)

            self._report(0, "base", self._run_dir / BASE_EVALUATION_FILE, score)
            while not self._stop and not self._dismissed:
                checkpoint = self._next_checkpoint()
                if checkpoint is None:
                    self._hear(POLL_S)
                else:
                    self._report_checkpoint(checkpoint, policy, score)

    def _next_checkpoint(self) -> Checkpoint | None:
        """The oldest one not looked at yet; one that a resumed run wrote again is a new one."""
        for checkpoint in find_checkpoints(self._run_dir):
            try:
                sealed = (checkpoint.update, (checkpoint.path / MANIFEST).stat().st_mtime_ns)
            except FileNotFoundError:  # pruned since it was listed
                continue
            if sealed not in self._seen:
                self._seen.add(sealed)
                return checkpoint
        return None

    def _report_checkpoint(self, checkpoint: Checkpoint, policy: Policy, score: Callable[[], Score]) -> None:
        kept = checkpoint.path / EVALUATION_FILE
        complaint = None if kept.is_file() else verify(checkpoint)
        if complaint is not None:
            # Damaged, or pruned meanwhile. The learner goes past it too, and writes it again.
            print(f"evaluator: not scored: {complaint}", file=sys.stderr)
            return

        def load_and_score() -> Score:
            load_weights(checkpoint.path, policy)
            return score()

        self._report(checkpoint.update, checkpoint.path.name, kept, load_and_score)

    def _report(self, update: int, name: str, kept: Path, score: Callable[[], Score]) -> None:
        """Tell the learner a score: the one kept from before, or a new one, which is kept."""
        if kept.is_file():
            result = Score(**json.loads(kept.read_text()))
        else:
            result = score()
            with whole_file(kept) as draft:
                write_json(draft, asdict(result))
        message = encode(Evaluation(update=update, checkpoint=name, **asdict(result)))
        while not self._control.send(message) and not self._stop:
            self._hear(POLL_S)

    def _hear(self, wait_s: float) -> None:
        self._beat("waiting")
        data = self._control.receive(wait_s)
        if data is None:
            return
        message = decode(from_learner, data)
        if isinstance(message, Bye) and message.again:
            self._control.send(encode(hello("evaluator", self._control.name)))
        elif isinstance(message, Bye):
            self._dismissed = True

    def _on_step(self, new_tokens: int) -> None:
        del new_tokens
        self._beat("evaluating")
        if self._stop:
            raise Leaving

    def _beat(self, state: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self._beat_s
            self._control.send(encode(Beat.model_validate({"state": state})))


def follow_run(run_dir: Path, endpoint: str, stop: StopRequest) -> int:
    """The evaluator of a run, for as long as the run lives."""
    with zmq_context() as context:
        control = ControlClient(context, endpoint, "evaluator")
        welcome = introduce(control, "evaluator", stop, patience_s=120)
        if welcome is None:
            return 0
        config = Config.model_validate_json(welcome.config)
        with suppress(Leaving):
            RunEvaluator(run_dir, control, config, stop, welcome.beat_s).run()
        control.send(encode(Bye(reason="done")))
    return 0


# --- the command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Of the evaluator alone; ``--follow`` is launch.py's."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.evaluator", description=(__doc__ or "").splitlines()[0]
    )
    add = command.add_argument
    add(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a checkpoint, a run folder (its base model and all its checkpoints), a model folder or a hub id",
    )
    add("--config", metavar="FILE", help="TOML settings, as for launch.py; not given: those of the run")
    add("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as for launch.py")
    add("--samples", type=int, metavar="N", help="held-out problems to score; 0: all")
    add("--k", type=int, metavar="N", help="also N samples a problem: avg@N, maj@N, pass@1, 2, 4, … N")
    add("--temperature", type=float, metavar="T", help="of these samples (default: eval_temperature)")
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two of the checkpoints, or two more, problem by problem: base, checkpoint-44, best, or a path",
    )
    add(
        "--answers",
        type=Path,
        metavar="FILE.jsonl",
        help="keep every completion, a line a problem, in a new file",
    )
    add("--plot", type=Path, metavar="FILE.png|svg", help="draw accuracy over updates")
    add("--json", action="store_true", help="print one JSON object")
    add("--follow", metavar="ENDPOINT", help=argparse.SUPPRESS)
    return command


def main() -> int:
    """Parse the command line and score."""
    given = vars(parser().parse_args())
    endpoint = given.pop("follow")
    stop = enter_process()
    submit_long_graphs()
    bound_memory()
    if endpoint:
        return follow_run(Path(given["checkpoints"][0]), endpoint, stop)
    return evaluate_alone(Options(**given), stop)


if __name__ == "__main__":
    run_command(main)
