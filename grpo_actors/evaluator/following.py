"""Evaluate a run while it trains: score the base model, then every checkpoint as it appears; report to the learner.

A score is saved in a file of the checkpoint and never computed again.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from grpo_actors.atomic import whole_file
from grpo_actors.config import Config
from grpo_actors.evaluator.score import Score, evaluate, held_out
from grpo_actors.failpoints import reach
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.process import StopRequest
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rundir.checkpoint_weights import load_weights
from grpo_actors.rundir.checkpoints import (
    Checkpoint,
    find_checkpoints,
    verify,
    write_json,
)
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE, EVALUATION_FILE, MANIFEST
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.wire.handshake import handshake, hello
from grpo_actors.wire.messages import Beat, Bye, Evaluation, decode, encode, from_learner

#: Seconds to wait for a message before the run folder is checked again.
POLL_S = 0.2
#: Seconds to wait for the learner, which may have to download its model first. If it fails, launch.py ends this process.
PATIENCE_S = 600.0


class EvaluationStopped(Exception):  # noqa: N818 - not an error: it only leaves the computation
    """Raised during an evaluation when the process is asked to stop."""


class RunEvaluator:
    """The evaluator of one run folder. It scores the base model and each checkpoint, and reports to the learner."""

    def __init__(
        self, run_dir: Path, control: ControlClient, config: Config, stop: StopRequest, beat_s: float
    ) -> None:
        self._run_dir = run_dir
        self._control = control
        self._config = config
        self._stop = stop
        self._beat_s = beat_s
        self._next_beat_s = 0.0
        #: Whether the learner has sent Bye.
        self._run_ended = False
        #: Update and time of the manifest, in nanoseconds, of each checkpoint that was handled.
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> None:
        """Score checkpoints until the learner sends Bye or the process is asked to stop."""
        config = self._config
        task = load_task(config.data, seed=config.run.seed)
        policy = load_policy(config.model, seed=config.run.seed)
        questions = held_out(task, config, policy)
        rewards = chosen_rewards(config.reward.functions, task)
        with open_scorer(rewards, config.reward) as scorer, open_episodes(config, policy) as turns:

            def score() -> Score:
                return evaluate(
                    policy, task, questions, config, scorer, episodes=turns, on_step=self._on_step
                )

            self._report(0, "base", self._run_dir / BASE_EVALUATION_FILE, score)
            while not self._stop and not self._run_ended:
                checkpoint = self._next_checkpoint()
                if checkpoint is None:
                    self._handle_message(POLL_S)
                else:
                    self._report_checkpoint(checkpoint, policy, score)

    def _next_checkpoint(self) -> Checkpoint | None:
        """Return the oldest checkpoint not handled yet, or None. One that a resumed run wrote again counts as new."""
        for checkpoint in find_checkpoints(self._run_dir):
            try:
                version = (checkpoint.update, (checkpoint.path / MANIFEST).stat().st_mtime_ns)
            except FileNotFoundError:  # pruned since it was listed
                continue
            if version not in self._seen:
                self._seen.add(version)
                return checkpoint
        return None

    def _report_checkpoint(self, checkpoint: Checkpoint, policy: Policy, score: Callable[[], Score]) -> None:
        score_file = checkpoint.path / EVALUATION_FILE
        fault = None if score_file.is_file() else verify(checkpoint)
        if fault is not None:
            # Damaged, or pruned meanwhile. A resumed learner skips a damaged checkpoint too, and writes it again.
            print(f"evaluator: not scored: {fault}", file=sys.stderr)
            return

        def load_and_score() -> Score:
            load_weights(checkpoint.path, policy)
            return score()

        self._report(checkpoint.update, checkpoint.path.name, score_file, load_and_score)

    def _report(self, update: int, name: str, score_file: Path, score: Callable[[], Score]) -> None:
        """Send the learner the score saved in `score_file`, or compute and save it first."""
        if score_file.is_file():
            result = Score(**json.loads(score_file.read_text()))
        else:
            result = score()
            reach("evaluator.scored")
            with whole_file(score_file) as draft:
                write_json(draft, asdict(result))
        message = encode(Evaluation(update=update, checkpoint=name, **asdict(result)))
        while not self._control.send(message) and not self._stop:
            self._handle_message(POLL_S)

    def _handle_message(self, wait_s: float) -> None:
        """Wait up to `wait_s` for a message of the learner and handle it."""
        self._beat("waiting")
        data = self._control.receive(wait_s)
        if data is None:
            return
        message = decode(from_learner, data)
        if isinstance(message, Bye) and message.again:
            self._control.send(encode(hello("evaluator", self._control.name)))
        elif isinstance(message, Bye):
            self._run_ended = True

    def _on_step(self, new_tokens: int) -> None:
        del new_tokens
        self._beat("evaluating")
        if self._stop:
            raise EvaluationStopped

    def _beat(self, state: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self._beat_s
            self._control.send(
                encode(Beat.model_validate({"state": state, "peak_bytes": mx.get_peak_memory()}))
            )


def follow_run(run_dir: Path, endpoint: str, stop: StopRequest) -> int:
    """Evaluate a run until it ends; return the exit code."""
    with zmq_context() as context:
        control = ControlClient(context, endpoint, "evaluator")
        welcome = handshake(control, "evaluator", stop, patience_s=PATIENCE_S)
        if welcome is None:
            return 0
        config = Config.model_validate_json(welcome.config)
        with suppress(EvaluationStopped):
            RunEvaluator(run_dir, control, config, stop, welcome.beat_s).run()
        control.send(encode(Bye(reason="done")))
    return 0
