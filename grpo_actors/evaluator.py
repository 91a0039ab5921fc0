"""ACTOR: scores checkpoints on held-out problems, always the same ones, so that curves compare.

    python -m grpo_actors.evaluator CHECKPOINT --config prod.toml [--samples N] [--json]

Alone it scores one folder (a checkpoint, a model folder, an adapter on its base) and prints
a table. In a run it scores the base model and then every checkpoint as it appears in the run folder, and
tells the learner. A score that was computed once is kept beside the checkpoint, and never computed again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from grpo_actors.backend import submit_long_graphs
from grpo_actors.checkpoints import MANIFEST, Checkpoint, find_checkpoints, verify, write_json
from grpo_actors.command import run_command
from grpo_actors.config import Config, load_config
from grpo_actors.episodes import episodes
from grpo_actors.errors import ModelError
from grpo_actors.evaluation import Score, evaluate, held_out
from grpo_actors.joining import Leaving, hello, introduce
from grpo_actors.messages import Beat, Bye, Evaluation, decode, encode, from_learner
from grpo_actors.policy.checkpoint import ADAPTER, check_adapter, load_weights
from grpo_actors.policy.model import Policy, load_base, load_policy
from grpo_actors.processes.door import StopRequest, bound_memory, enter_process
from grpo_actors.processes.preflight import BASE_EVALUATION_FILE, CONFIG_FILE
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import zmq_context

EVALUATION_FILE = "evaluation.json"

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
            temporary = kept.with_suffix(".tmp")
            write_json(temporary, asdict(result))
            temporary.replace(kept)
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


# --- alone ----------------------------------------------------------------------------------------


def evaluate_alone(folder: Path, config: Config, samples: int | None, *, as_json: bool) -> int:
    """Score one folder and print what came out."""
    task = load_task(config.data, seed=config.run.seed)
    policy = load_folder(folder, config)
    problems = held_out(task, config, policy, samples)
    rewards = chosen_rewards(config.reward.functions, task)
    with open_scorer(rewards, config.reward) as scorer, episodes(config, policy) as turns:
        score = evaluate(policy, task, problems, config, scorer, episodes=turns)
    print(json.dumps({"checkpoint": str(folder), **asdict(score)}) if as_json else as_table(folder, score))
    return 0


def settings(folder: Path, file: str | None, overrides: Sequence[str]) -> Config:
    """What to score `folder` by: the file given, else the settings of the run it lies in, else the defaults.

    Raises:
        ConfigError: a file, a name or a value is unusable.
    """
    own = folder.resolve().parent / CONFIG_FILE
    if file is None and own.is_file() and (folder / MANIFEST).is_file():
        return load_config(own, overrides).config
    return load_config(file, overrides).config


def load_folder(folder: Path, config: Config) -> Policy:
    """The policy in a folder: a model as it is, or an adapter on the configuration's base model.

    Raises:
        ModelError: there is nothing usable in it.
        ConfigError: it holds an adapter of another kind or base than the configuration's.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a checkpoint or a model folder")
    if (folder / ADAPTER).is_file():
        check_adapter(folder, config.model)
        policy = load_policy(config.model, seed=config.run.seed)
        load_weights(folder, policy)
        return policy
    # As it is: what it was trained from, and how, is no matter.
    plain = {"model_name": str(folder.resolve()), "fine_tune_type": "full", "base_bits": 0}
    return load_base(config.model.model_copy(update=plain))


def as_table(folder: Path, score: Score) -> str:
    """The score for a reader."""
    rows = [
        ("problems", f"{score.samples}"),
        (
            "accuracy, greedy",
            f"{score.accuracy:.1%}   (95 %: {score.accuracy_low:.1%} to {score.accuracy_high:.1%})",
        ),
        *(
            [("accuracy, sampled", f"{score.sampled_accuracy:.1%}")]
            if score.sampled_accuracy is not None
            else []
        ),
        *((f"reward {name}", f"{value:.3f}") for name, value in score.rewards.items()),
        ("completion length", f"{score.completion_length_mean:.1f} tokens"),
        ("truncated", f"{score.truncated_share:.1%}"),
        ("time", f"{score.seconds:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(folder), *(f"  {name:<{width}}  {value}" for name, value in rows)])


def main() -> int:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.evaluator", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint or a model folder; with --follow a run folder"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML settings, as for launch.py; not given: those of the run"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as for launch.py"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="held-out problems to score; 0: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--follow", metavar="ENDPOINT", help=argparse.SUPPRESS)  # how launch.py starts it
    args = parser.parse_args()
    stop = enter_process()
    submit_long_graphs()
    bound_memory()
    if args.follow:
        return follow_run(args.checkpoint, args.follow, stop)
    config = settings(args.checkpoint, args.config, args.overrides)
    return evaluate_alone(args.checkpoint, config, args.samples, as_json=args.json)


if __name__ == "__main__":
    run_command(main)
