"""ACTOR: scores checkpoints on held-out problems, always the same ones, so that curves compare.

    python -m grpo_actors.evaluator CHECKPOINT --config prod.toml [--samples N] [--json]

Alone it scores one folder (a checkpoint, a model folder, a LoRA checkpoint beside its base) and prints
a table. In a run it scores the base model and then every checkpoint as it appears in the run folder, and
tells the learner. A score that was computed once is kept beside the checkpoint, and never computed again.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from grpo_actors.checkpoints import Checkpoint, find_checkpoints, write_json
from grpo_actors.command import run_command
from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError, DataError, ModelError
from grpo_actors.messages import Beat, Bye, Evaluation, decode, encode, from_learner
from grpo_actors.policy.checkpoint import ADAPTER, load_weights
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.sampling import Sample, SamplingParams, sample_groups
from grpo_actors.process import StopRequest, bound_memory, enter_process
from grpo_actors.rollout import Leaving, hello, introduce
from grpo_actors.schedule.order import sample_seeds
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem, Task
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import Endpoints, zmq_context

EVALUATION_FILE = "evaluation.json"
BASE_EVALUATION_FILE = "evaluation-base.json"

#: The two-sided 95 % quantile of the normal distribution.
Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Score:
    """What one policy achieves on the held-out problems."""

    samples: int
    #: Share of greedy completions that are right.
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    #: The same at the evaluator's temperature; None: not asked for.
    sampled_accuracy: float | None
    #: Unweighted mean of each reward over the greedy completions that it judged.
    rewards: dict[str, float]
    completion_length_mean: float
    truncated_share: float
    seconds: float


def held_out(task: Task, config: Config, policy: Policy, samples: int | None = None) -> list[Problem]:
    """The problems to score: a subset of the held-out split that depends on nothing but its size.

    Raises:
        DataError: there is no held-out problem with a prompt short enough.
    """
    problems = task.problems("eval")
    count = config.evaluator.eval_subset_size if samples is None else samples
    indices = random.Random("evaluation").sample(range(len(problems)), k=min(count or len(problems), len(problems)))
    limit = config.data.max_prompt_length
    chosen = [p for p in map(problems.__getitem__, indices) if len(policy.encode_chat(p.messages)) <= limit]
    if not chosen:
        raise DataError(f"data: no held-out problem has a prompt of at most {limit} tokens (data.max_prompt_length)")
    return chosen


def evaluate(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    config: Config,
    scorer: Scorer,
    on_step: Callable[[int], None] | None = None,
) -> Score:
    """Score a policy: greedy, and sampled too if the configuration asks for it."""
    started_s = time.monotonic()
    greedy = list(_answers(policy, problems, config, 0.0, on_step))
    texts = [policy.decode(sample.tokens) for sample in greedy]
    right = sum(task.is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True))
    sampled = None
    if config.evaluator.eval_sampled:
        drawn = _answers(policy, problems, config, config.evaluator.eval_temperature, on_step)
        sampled = fmean(
            task.is_correct(policy.decode(sample.tokens), problem.answer)
            for sample, problem in zip(drawn, problems, strict=True)
        )
    low, high = wilson_interval(right, len(problems))
    return Score(
        samples=len(problems),
        accuracy=right / len(problems),
        accuracy_low=low,
        accuracy_high=high,
        sampled_accuracy=sampled,
        rewards=_reward_means(scorer, problems, texts),
        completion_length_mean=fmean(len(sample.tokens) for sample in greedy),
        truncated_share=fmean(not sample.finished for sample in greedy),
        seconds=time.monotonic() - started_s,
    )


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): honest at 0 and at 1, where the usual one has no width."""
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def _answers(
    policy: Policy,
    problems: Sequence[Problem],
    config: Config,
    temperature: float,
    on_step: Callable[[int], None] | None,
) -> Iterator[Sample]:
    """One completion for each problem, in order, sampled in batches."""
    params = SamplingParams(
        max_new_tokens=config.evaluator.eval_max_new_tokens or config.rollout.max_new_tokens,
        temperature=temperature,
        stop=config.rollout.stop,
    )
    size = config.evaluator.eval_batch_size
    for first in range(0, len(problems), size):
        batch = problems[first : first + size]
        prompts = [policy.encode_chat(problem.messages) for problem in batch]
        # The same draws for every checkpoint: two of them differ by their weights only.
        seeds = [sample_seeds(config.run.seed, 0, f"evaluation/{problem.id}", 1) for problem in batch]
        for group in sample_groups(policy, prompts, seeds, params, on_step):
            yield group[0]


def _reward_means(scorer: Scorer, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for problem, text in zip(problems, texts, strict=True):
        for name, (value,) in scorer.score(problem, [text]).rewards.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: fmean(given) for name, given in values.items()}


# --- in a run -------------------------------------------------------------------------------------


class RunEvaluator:
    """Scores what appears in a run folder and reports it to the learner."""

    def __init__(self, run_dir: Path, control: ControlClient, config: Config, stop: StopRequest, beat_s: float) -> None:
        self._run_dir = run_dir
        self._control = control
        self._config = config
        self._stop = stop
        self._beat_s = beat_s
        self._next_beat_s = 0.0
        self._dismissed = False

    def run(self) -> None:
        """Until dismissed or asked to stop."""
        config = self._config
        task = load_task(config.data, seed=config.run.seed)
        policy = load_policy(config.model, seed=config.run.seed)
        problems = held_out(task, config, policy)
        rewards = chosen_rewards(config.reward.functions, task)
        with closing(Scorer(rewards, timeout_s=config.reward.reward_timeout_s)) as scorer:

            def score() -> Score:
                return evaluate(policy, task, problems, config, scorer, self._on_step)

            self._report(0, "base", self._run_dir / BASE_EVALUATION_FILE, score)
            done = {0}
            while not self._stop and not self._dismissed:
                checkpoint = next((c for c in find_checkpoints(self._run_dir) if c.update not in done), None)
                if checkpoint is None:
                    self._hear(0.2)
                    continue
                done.add(checkpoint.update)
                self._report_checkpoint(checkpoint, policy, score)

    def _report_checkpoint(self, checkpoint: Checkpoint, policy: Policy, score: Callable[[], Score]) -> None:
        def load_and_score() -> Score:
            load_weights(checkpoint.path, policy)
            return score()

        self._report(checkpoint.update, checkpoint.path.name, checkpoint.path / EVALUATION_FILE, load_and_score)

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
            self._hear(0.2)

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
        try:
            RunEvaluator(run_dir, control, config, stop, welcome.beat_s).run()
        except Leaving:
            pass
        control.send(encode(Bye(reason="done")))
    return 0


# --- alone ----------------------------------------------------------------------------------------


def evaluate_alone(folder: Path, config: Config, samples: int | None, *, as_json: bool) -> int:
    """Score one folder and print what came out."""
    task = load_task(config.data, seed=config.run.seed)
    policy = load_folder(folder, config)
    problems = held_out(task, config, policy, samples)
    rewards = chosen_rewards(config.reward.functions, task)
    with closing(Scorer(rewards, timeout_s=config.reward.reward_timeout_s)) as scorer:
        score = evaluate(policy, task, problems, config, scorer)
    print(json.dumps({"checkpoint": str(folder), **asdict(score)}) if as_json else as_table(folder, score))
    return 0


def load_folder(folder: Path, config: Config) -> Policy:
    """The policy in a folder: a model as it is, or an adapter on the configuration's base model."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a checkpoint or a model folder")
    if (folder / ADAPTER).is_file():
        if config.model.fine_tune_type != "lora":
            raise ConfigError(f"{folder} holds an adapter; set model.fine_tune_type = lora and its base model")
        policy = load_policy(config.model, seed=config.run.seed)
        load_weights(folder, policy)
        return policy
    plain = {"model_name": str(folder.resolve()), "fine_tune_type": "full"}
    return load_policy(config.model.model_copy(update=plain), seed=config.run.seed)


def as_table(folder: Path, score: Score) -> str:
    """The score for a reader."""
    rows = [
        ("problems", f"{score.samples}"),
        (
            "accuracy, greedy",
            f"{score.accuracy:.1%}   (95 %: {score.accuracy_low:.1%} to {score.accuracy_high:.1%})",
        ),
        *([("accuracy, sampled", f"{score.sampled_accuracy:.1%}")] if score.sampled_accuracy is not None else []),
        *((f"reward {name}", f"{value:.3f}") for name, value in score.rewards.items()),
        ("completion length", f"{score.completion_length_mean:.1f} tokens"),
        ("truncated", f"{score.truncated_share:.1%}"),
        ("time", f"{score.seconds:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(folder), *(f"  {name:<{width}}  {value}" for name, value in rows)])


def main() -> int:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(prog="python -m grpo_actors.evaluator", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint or a model folder; with --follow a run folder")
    parser.add_argument("--config", metavar="FILE", help="TOML settings, as for launch.py")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as for launch.py")
    parser.add_argument("--samples", type=int, metavar="N", help="held-out problems to score; 0: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--follow", metavar="ENDPOINT", help=argparse.SUPPRESS)  # how launch.py starts it
    args = parser.parse_args()
    stop = enter_process()
    bound_memory()
    if args.follow:
        return follow_run(args.checkpoint, args.follow or Endpoints.read(args.checkpoint).control, stop)
    return evaluate_alone(args.checkpoint, load_config(args.config, args.overrides).config, args.samples, as_json=args.json)


if __name__ == "__main__":
    run_command(main)
