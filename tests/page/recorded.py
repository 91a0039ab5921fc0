"""A run as the real writers record it: every kind of record, recorded groups with turns of an environment, no model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from grpo_actors.config import Config, load_config
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.recording import GroupsFile
from grpo_actors.observe.sinks import Journal
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.tasks.task import Problem

#: Unix seconds of the start, and seconds of an update.
BEGIN, UPDATE_S = 1_800_000_000.0, 10.0
WAIT_S = 4.0
#: Share of their time in which workers wait.
WORKERS_WAIT = 0.25
TOKENIZER = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
RIGHT, WRONG = "<reasoning>2+3=5.</reasoning><answer>5</answer><|end|>", "<answer>6</answer>"
REPLY = "<|user|>Use the tags.<|end|><|assistant|>"
ALARM = "90% of the completions are cut for 10 updates: rollout.max_new_tokens = 40 is too few; raise it"


def settings(**changes: Any) -> Config:
    """The settings of the run: those of the quickstart, with named rewards."""
    overrides = [
        *("reward.functions={correctness=1.0, strict_format=0.2}", "model.model_name=tiny"),
        *(f"{name}={json.dumps(value)}" for name, value in changes.items()),
    ]
    return load_config("quickstart.toml", overrides).config


class RecordedRun:
    """A run folder that is being written, update by update."""

    def __init__(
        self, folder: Path, *, groups: bool = True, publish: Any = None, planned: int = 40, **changes: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.now = BEGIN
        self.config = settings(output_dir=str(folder), **changes)
        self.planned = planned
        (folder / "config.json").write_text(self.config.model_dump_json())
        self.journal = Journal(folder, publish=publish, clock=lambda: self.now)
        self._groups = GroupsFile(folder, after_update=0) if groups else None
        self.journal.append(
            "start",
            {
                "run_name": folder.name,
                "model_name": "tiny",
                "total_updates": planned,
                "config": self.config.model_dump(mode="json"),
            },
        )
        self.journal.append(
            "worker", {"worker": "rollout-0", "role": "rollout", "state": "joined", "groups": 0}
        )

    def update(self, update: int, **metrics: Any) -> None:
        """Record one update with all that comes with it."""
        self.now = BEGIN + UPDATE_S * update
        learned = 1 - math.exp(-update / 12)
        self.journal.append(
            "worker",
            {
                "worker": "rollout-0",
                "role": "rollout",
                "state": "sampling",
                "groups": 2 * update,
                "version": update,
                "memory_gb": 0.5,
            },
        )
        self.journal.append(
            "metrics",
            {
                "update": update,
                "total_updates": self.planned,
                "loss": 0.01 * math.sin(update),
                "grad_norm": 0.3,
                "reward_mean": 0.4 + 0.7 * learned,
                "reward_std": 0.5 - 0.3 * learned,
                "entropy": 0.3 - 0.2 * learned,
                "rewards": {"correctness": 0.3 + 0.6 * learned, "strict_format": 0.8 + 0.2 * learned},
                "clip_share": 0.01,
                "kl": 0.02 * learned,
                "ratio_max": 1.1,
                "logprob_gap_mean": 0.002,
                "learning_rate": 1e-5,
                "completion_length_mean": 20 + 5 * learned,
                "completion_length_max": 40,
                "truncated_share": 0.1,
                "zero_variance_share": 0.25,
                "staleness": {"0": 1, "1": 1},
                "memory_gb": 1.5,
                "peers_memory_gb": {"rollout-0": 0.5},
                "update_s": UPDATE_S,
                "wait_s": WAIT_S,
                "learner_wait_share": WAIT_S / UPDATE_S,
                "rollout_wait_share": WORKERS_WAIT,
                "rollout_tokens_per_s": 1000.0,
                "learner_tokens_per_s": 2000.0,
                **metrics,
            },
        )
        groups = [group(update, index) for index in range(2)]
        if self._groups is not None:
            # The second completion of each group was computed: every third token has become likelier.
            ratios = {
                4 * index + 1: [0.1 * (place % 3 == 0) for place in range(60)] for index in range(len(groups))
            }
            self._groups.write(update, 2 * self.planned, groups, ratios)
        first = groups[0]
        completions = [
            {
                "text": TOKENIZER.decode(c.tokens, skip_special_tokens=False),
                "reward": reward_of(c),
                "rewards": c.rewards,
                "truncated": not c.finished,
            }
            for c in first.completions
        ]
        self.journal.append(
            "sample",
            {
                "update": update,
                "problem": first.problem.id,
                "prompt": "2+3?",
                "answer": "5",
                "completions": completions,
            },
        )

    def score(self, update: int, value: float, *, best: bool) -> None:
        """Record a held-out score."""
        measure = {
            "metric": "accuracy",
            "weights": {},
            "problems": 256,
            "digest": "d",
            "temperature": 0.0,
            "max_new_tokens": 40,
        }
        score = {"value": value, "low": value - 0.05, "high": value + 0.05, "measure": measure}
        gain = {"value": value - 0.4, "low": value - 0.5, "high": value - 0.3} if update else None
        name = f"checkpoint-{update}" if update else "base"
        self.journal.append(
            "eval",
            {
                "update": update,
                "checkpoint": name,
                "score": score,
                "gain": gain,
                "best": best,
                "seconds": 6.0,
            },
        )

    def alarm(self, update: int) -> None:
        """Raise an alarm."""
        self.journal.append("alarm", {"name": "truncated", "text": ALARM, "update": update})

    def stop(self) -> None:
        """End the run."""
        self.journal.append("stop", {"reason": "all updates done", "exit_code": 0})

    def close(self) -> None:
        """Close the files."""
        self.journal.close()
        if self._groups is not None:
            self._groups.close()


def record_run(folder: Path, updates: int = 40, **options: Any) -> Path:
    """Record a whole run."""
    run = RecordedRun(folder, planned=updates, **options)
    run.score(0, 0.4, best=True)
    for update in range(1, updates + 1):
        run.update(update)
        if update % 10 == 0:
            run.score(update, 0.5 + 0.3 * update / updates, best=True)
    run.alarm(updates)
    run.stop()
    run.close()
    return folder


def reward_of(completion: SampledCompletion) -> float:
    """The weighted sum of a completion's rewards."""
    return 1.0 * (completion.rewards["correctness"] or 0) + 0.2 * (completion.rewards["strict_format"] or 0)


def group(update: int, index: int) -> SampledGroup:
    """A group of four: right, right after a reply of the environment, wrong, and cut."""
    problem = Problem(f"add-{update}-{index}", ({"role": "user", "content": "What is 2+3?"},), "5")
    completions = [
        completion([RIGHT], correct=1.0, form=1.0),
        completion([WRONG, REPLY, RIGHT], correct=1.0, form=1.0),
        completion([WRONG], correct=0.0, form=1.0),
        completion(["<reasoning>2+3=2+3=2+3=2+3="], correct=0.0, form=0.0, finished=False),
    ]
    return SampledGroup(
        2 * update + index, 0, problem, TOKENIZER.encode("What is 2+3?").ids, "rollout-0", completions
    )


def completion(
    parts: Sequence[str], *, correct: float, form: float, finished: bool = True
) -> SampledCompletion:
    """A completion of these texts: the policy's and the environment's in turn."""
    tokens, bounds = [], []
    for part in parts:
        tokens += TOKENIZER.encode(part).ids
        bounds.append(len(tokens))
    logprobs = [-0.01 - 0.5 * (place % 7 == 3) for place in range(len(tokens))]
    rewards = {"correctness": correct, "strict_format": form}
    return SampledCompletion(tokens, logprobs, [0] * len(tokens), finished, rewards, bounds[:-1])
