"""Evaluate a run while it trains: score the base model, then every checkpoint as it appears; report to the learner.

A score is saved in a file of the checkpoint and never computed again. A checkpoint that cannot be scored, because it is
damaged or its evaluation ended this process several times, is reported as such: the learner does not wait for its score.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.errors import RunError
from grpo_actors.evaluator.score import evaluate, held_out
from grpo_actors.failpoints import reach
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.process import EVALUATOR_TOKEN, StopRequest, take_secret
from grpo_actors.progress import LOADING_S, begin_work, given_up, scoring_patience_s
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rundir.checkpoint_weights import load_weights
from grpo_actors.rundir.checkpoints import Checkpoint, find_checkpoints, verify
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE, EVALUATION_FILE
from grpo_actors.rundir.scores import Score, read_score, write_score
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.keys import ClientKey, read_run_key
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.wire.handshake import handshake, hello
from grpo_actors.wire.messages import Beat, Bye, Evaluation, Unscored, decode, encode, from_learner

#: Seconds to wait for a message before the run folder is checked again.
POLL_S = 0.2
#: Seconds to wait for the learner: it may have to download its model first. If it fails, launch.py ends this process.
PATIENCE_S = math.inf
#: Why work that the supervisor has given up has no score.
GIVEN_UP = "its evaluation ended the evaluator several times"


class EvaluationStopped(Exception):  # noqa: N818 - not an error: it only leaves the computation
    """Raised during an evaluation when the process is asked to stop."""


class RunEvaluator:
    """The evaluator of one run folder. It scores the base model and each checkpoint, and reports to the learner."""

    def __init__(
        self,
        run_dir: Path,
        control: ControlClient,
        config: Config,
        stop: StopRequest,
        beat_s: float,
        *,
        token: str = "",
    ) -> None:
        self._run_dir = run_dir
        self._control = control
        self._config = config
        self._stop = stop
        self._beat_s = beat_s
        self._token = token
        self._next_beat_s = 0.0
        #: Whether the learner has sent Bye.
        self._run_ended = False
        self._patience_s = scoring_patience_s(config.reward.reward_timeout_s)
        #: What is scored; empty in between.
        self._work = ""
        #: Updates whose checkpoint was reported to this learner. One that a resumed learner wrote again is reported again.
        self._reported: set[int] = set()
        #: The report on the base model, which cannot be scored again once a checkpoint is loaded.
        self._base = b""

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

            self._begin("base model")
            if self._work in given_up():
                self._send(Unscored(update=0, checkpoint="base", reason=GIVEN_UP))
            else:
                score_file = self._run_dir / BASE_EVALUATION_FILE
                self._report(0, "base", _saved(score_file) or _scored(score_file, score))
            while not self._stop and not self._run_ended:
                checkpoint = self._next_checkpoint()
                if checkpoint is None:
                    self._begin("")
                    self._handle_message(POLL_S)
                else:
                    self._report_checkpoint(checkpoint, policy, score)

    def _next_checkpoint(self) -> Checkpoint | None:
        """Return the oldest checkpoint not reported yet, or None."""
        for checkpoint in find_checkpoints(self._run_dir):
            if checkpoint.update not in self._reported:
                self._reported.add(checkpoint.update)
                return checkpoint
        return None

    def _report_checkpoint(self, checkpoint: Checkpoint, policy: Policy, score: Callable[[], Score]) -> None:
        self._begin(checkpoint.path.name)
        score_file = checkpoint.path / EVALUATION_FILE
        saved = _saved(score_file)
        fault = GIVEN_UP if self._work in given_up() else None
        if fault is None and saved is None:
            fault = verify(checkpoint)
        if fault is not None:
            # Damaged, or pruned meanwhile. A resumed learner skips a damaged checkpoint too, and writes it again.
            self._send(Unscored(update=checkpoint.update, checkpoint=checkpoint.path.name, reason=fault))
            return

        if saved is None:
            load_weights(checkpoint.path, policy)
            saved = _scored(score_file, score)
        self._report(checkpoint.update, checkpoint.path.name, saved)

    def _report(self, update: int, name: str, result: Score) -> None:
        """Send the learner a score."""
        message = Evaluation(update=update, checkpoint=name, **asdict(result))
        if not update:
            self._base = encode(message)
        self._send(message)

    def _send(self, message: Evaluation | Unscored) -> None:
        data = encode(message)
        while not self._control.send(data) and not self._stop:
            self._handle_message(POLL_S)

    def _begin(self, work: str) -> None:
        """Report the work that begins. Up to its first step it may load and compile for long."""
        self._work = work
        begin_work(work, LOADING_S if work else self._patience_s)

    def _handle_message(self, wait_s: float) -> None:
        """Wait up to `wait_s` for a message of the learner and handle it."""
        self._beat("waiting")
        data = self._control.receive(wait_s)
        if data is None:
            return
        message = decode(from_learner, data)
        if isinstance(message, Bye) and message.again:
            # A new learner, which has none of the scores.
            self._control.send(encode(hello("evaluator", self._control.name, token=self._token)))
            self._reported.clear()
            if self._base:
                self._control.send(self._base)
        elif isinstance(message, Bye):
            self._run_ended = True

    def _on_step(self, new_tokens: int) -> None:
        del new_tokens
        begin_work(self._work, self._patience_s)
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


def _saved(score_file: Path) -> Score | None:
    """Return a saved score. One that cannot be read is computed again: it may have been cut by a full disk."""
    try:
        return read_score(score_file)
    except RunError as error:
        print(f"scored again: {error}", file=sys.stderr)
        return None


def _scored(score_file: Path, score: Callable[[], Score]) -> Score:
    """Compute a score and save it."""
    result = score()
    reach("evaluator.scored")
    write_score(score_file, result)
    return result


def follow_run(
    run_dir: Path,
    endpoint: str,
    stop: StopRequest,
    *,
    key_file: Path | None = None,
    allowed: Sequence[str] = (),
) -> int:
    """Evaluate a run until it ends; return the exit code.

    Args:
        run_dir: The run's folder.
        endpoint: Address of the learner's control socket.
        stop: Set by the first signal.
        key_file: A key with the role evaluator; None: the run's own.
        allowed: Names of the code that the learner's settings may run here (`consent`).

    Raises:
        ConfigError: the learner's settings name code that is not `allowed`.
    """
    token = take_secret(EVALUATOR_TOKEN)
    key = ClientKey.read(key_file) if key_file else read_run_key(run_dir)
    with zmq_context() as context:
        control = ControlClient(context, endpoint, "evaluator", key)
        welcome = handshake(control, "evaluator", stop, patience_s=PATIENCE_S, token=token)
        if welcome is None:
            return 0
        begin_work("", LOADING_S)  # to load the model
        config = Config.model_validate_json(welcome.config)
        consent.check(consent.code_of(config), allowed, endpoint)
        with suppress(EvaluationStopped):
            RunEvaluator(run_dir, control, config, stop, welcome.beat_s, token=token).run()
        control.send(encode(Bye(reason="done")))
    return 0
