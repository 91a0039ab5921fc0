"""Evaluate a run while it trains: score the base model, then every checkpoint as it appears; report to the learner.

Where it can, it fetches a version that will become a checkpoint while that is still being written, as workers do, so that
the score is there with the checkpoint. A score is saved in a file of the checkpoint. It is computed again only if the settings have changed what is measured. A
checkpoint that cannot be scored, because it is damaged or its evaluation ended this process several times, is reported
as such: the learner does not wait for its score.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import mlx.core as mx

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.errors import RewardError, RunError
from grpo_actors.evaluator.score import evaluate, gain_over, held_out, measure_of
from grpo_actors.failpoints import reach
from grpo_actors.policy.device import return_unused_memory
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.process import EVALUATOR_TOKEN, StopRequest, take_secret
from grpo_actors.progress import LOADING_S, begin_work, given_up, scoring_patience_s
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rollout.joining import fetch_weights, weights_client
from grpo_actors.rundir.checkpoint_weights import load_weights
from grpo_actors.rundir.checkpoints import Checkpoint, find_checkpoints, verify
from grpo_actors.rundir.claim import with_rewards
from grpo_actors.rundir.folder import BASE, BASE_EVALUATION_FILE, EVALUATION_FILE, checkpoint_name
from grpo_actors.rundir.scores import SavedScore, read_score, write_score
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.scoring import TrainerState, open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.keys import ClientKey, read_run_key
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.transport.weights import WeightsClient
from grpo_actors.wire.handshake import handshake, hello
from grpo_actors.wire.messages import (
    Announcement,
    Beat,
    Bye,
    Evaluation,
    Message,
    Unscored,
    decode,
    encode,
    from_learner,
)

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
        total_updates: int = 0,
        weights: WeightsClient | None = None,
        token: str = "",
    ) -> None:
        """Follow a run that plans `total_updates`; versions of its weights come from `weights`, None: from checkpoints only."""
        self._run_dir = run_dir
        self._control = control
        self._config = config
        self._stop = stop
        self._beat_s = beat_s
        self._total_updates = total_updates
        self._weights = weights
        self._token = token
        #: The newest version that the learner has announced, and the newest that this evaluator has tried to fetch.
        self._announced = self._tried = 0
        #: Scores of versions whose checkpoint is still being written, by update; an error if it has no score.
        self._ahead: dict[int, SavedScore | RewardError] = {}
        self._next_beat_s = 0.0
        #: Whether the learner has sent Bye.
        self._run_ended = False
        self._patience_s = scoring_patience_s(config.reward.reward_timeout_s)
        #: What is scored; empty in between.
        self._work = ""
        #: Updates whose checkpoint was reported to this learner. One that a resumed learner wrote again is reported again.
        self._reported: set[int] = set()
        #: The score of the base model, which cannot be computed again once a checkpoint is loaded; None: it has none.
        self._base: SavedScore | None = None

    def run(self) -> None:
        """Score checkpoints until the learner sends Bye or the process is asked to stop."""
        task = open_task(self._config)
        config = with_rewards(self._config, task)
        policy = load_policy(config.model, seed=config.run.seed)
        policy.chat.use(config.data.chat_template, config.data.chat_template_kwargs)
        questions = held_out(task, config, policy)
        if self._stop:
            return
        self._measure = measure_of(questions, config)
        with (
            open_scorer(config) as scorer,
            open_episodes(config, policy) as turns,
        ):

            def score(update: int) -> SavedScore:
                scorer.trainer_state = TrainerState(update)
                scored = evaluate(
                    policy, task, questions, config, scorer, episodes=turns, on_step=self._on_step
                )
                return_unused_memory()
                return scored

            self._begin("base model", loads=True)
            if self._work in given_up():
                self._send(Unscored(update=0, checkpoint=BASE, reason=GIVEN_UP))
            else:
                self._base = self._report(0, self._run_dir / BASE_EVALUATION_FILE, partial(score, 0))
            while not self._stop and not self._run_ended:
                checkpoint = self._next_checkpoint()
                if checkpoint is not None:
                    self._report_checkpoint(checkpoint, policy, score)
                elif self._may_fetch():
                    self._score_ahead(policy, score)
                else:
                    self._begin("")
                    self._handle_messages(POLL_S)

    def _next_checkpoint(self) -> Checkpoint | None:
        """Return the oldest checkpoint not reported yet, or None."""
        for checkpoint in find_checkpoints(self._run_dir):
            if checkpoint.update not in self._reported:
                self._reported.add(checkpoint.update)
                return checkpoint
        return None

    def _may_fetch(self) -> bool:
        """Return whether the newest version will become a checkpoint that has no score yet."""
        update = self._announced
        return (
            self._weights is not None
            and update > self._tried
            and update not in self._reported
            and (self._config.saves_after(update) or update == self._total_updates)
            and checkpoint_name(update) not in given_up()
        )

    def _score_ahead(self, policy: Policy, score: Callable[[int], SavedScore]) -> None:
        """Score the newest version before its checkpoint is there; do nothing if it has been replaced by then."""
        assert self._weights is not None
        self._tried = update = self._announced
        self._begin(checkpoint_name(update), loads=True)
        fetched = fetch_weights(self._weights, on_chunk=partial(self._beat, "evaluating"))
        if fetched is None or fetched[0] != update:
            return
        policy.load_trainable(fetched[1])
        del fetched
        try:
            self._ahead[update] = self._with_gain(score(update))
        except RewardError as error:
            self._ahead[update] = error

    def _with_gain(self, scored: SavedScore) -> SavedScore:
        """Return a score with its gain over the base model."""
        gain = gain_over(self._base, scored) if self._base else None
        return scored.model_copy(update={"report": scored.report.model_copy(update={"gain": gain})})

    def _report_checkpoint(
        self, checkpoint: Checkpoint, policy: Policy, score: Callable[[int], SavedScore]
    ) -> None:
        ahead = self._ahead.pop(checkpoint.update, None)
        self._begin(checkpoint.path.name, loads=ahead is None)
        if self._work in given_up():
            self._send(Unscored(update=checkpoint.update, checkpoint=checkpoint.path.name, reason=GIVEN_UP))
            return

        def load_and_score() -> SavedScore:
            if isinstance(ahead, RewardError):
                raise ahead
            if ahead is not None:
                return ahead
            if fault := verify(checkpoint):
                # Damaged, or pruned meanwhile. A resumed learner skips a damaged checkpoint too, and writes it again.
                raise RunError(fault)
            load_weights(checkpoint.path, policy)
            return self._with_gain(score(checkpoint.update))

        self._report(checkpoint.update, checkpoint.path / EVALUATION_FILE, load_and_score)

    def _report(self, update: int, score_file: Path, score: Callable[[], SavedScore]) -> SavedScore | None:
        """Send the learner the score saved in `score_file`, or compute and save it first; return it if there is one."""
        saved = self._saved(score_file)
        if saved is None:
            try:
                saved = score()
            except (RewardError, RunError) as error:
                self._send(Unscored(update=update, checkpoint=checkpoint_name(update), reason=str(error)))
                return None
            reach("evaluator.scored")
            write_score(score_file, saved)
        self._send(Evaluation(update=update, checkpoint=checkpoint_name(update), report=saved.report))
        return saved

    def _saved(self, score_file: Path) -> SavedScore | None:
        """Return a saved score, unless it was measured differently or, as after a full disk, cannot be read."""
        try:
            saved = read_score(score_file)
        except RunError as error:
            print(f"scored again: {error}", file=sys.stderr)
            return None
        return saved if saved is not None and saved.report.score.measure == self._measure else None

    def _send(self, message: Evaluation | Unscored) -> None:
        data = encode(message)
        while not self._control.send(data) and not self._stop:
            self._handle_messages(POLL_S)

    def _begin(self, work: str, *, loads: bool = False) -> None:
        """Report the work that begins; one that `loads` may load and compile for long up to its first step."""
        self._work = work
        begin_work(work, LOADING_S if loads else self._patience_s)

    def _handle_messages(self, wait_s: float) -> None:
        """Wait up to `wait_s` for a message of the learner, and handle all that are there."""
        self._beat("waiting")
        while (data := self._control.receive(wait_s)) is not None:
            self._handle(decode(from_learner, data))
            wait_s = 0.0

    def _handle(self, message: Message) -> None:
        if isinstance(message, Announcement):
            self._announced = message.version
        elif isinstance(message, Bye) and message.again:
            # A new learner, which has none of the scores.
            self._control.send(encode(hello("evaluator", self._control.name, token=self._token)))
            self._reported.clear()
            self._ahead.clear()
            self._announced = self._tried = 0
            if self._base:
                base = Evaluation(update=0, checkpoint=BASE, report=self._base.report)
                self._control.send(encode(base))
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
    with zmq_context() as context, ExitStack() as stack:
        control = ControlClient(context, endpoint, "evaluator", key)
        welcome = handshake(control, "evaluator", stop, patience_s=PATIENCE_S, token=token)
        if welcome is None:
            return 0
        begin_work("", LOADING_S)  # to load the model
        config = Config.model_validate_json(welcome.config)
        consent.check(consent.code_of(config), allowed, endpoint)
        # A key with the role evaluator opens no weights.
        weights = (
            None
            if key_file
            else stack.enter_context(closing(weights_client(context, welcome, endpoint, key)))
        )
        evaluator = RunEvaluator(
            *(run_dir, control, config, stop, welcome.beat_s),
            total_updates=welcome.total_updates,
            weights=weights,
            token=token,
        )
        with suppress(EvaluationStopped):
            evaluator.run()
        control.send(encode(Bye(reason="done")))
    return 0
