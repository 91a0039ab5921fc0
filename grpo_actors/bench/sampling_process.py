"""Sample a workload once a round, with our sampler or with mlx-lm's.

`rollout` uses `Sampling` in its own process, or runs this module in several processes.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from grpo_actors.bench.bench_process import reply, serve
from grpo_actors.bench.policies import plan, planned, rollout_policy, size_of
from grpo_actors.bench.workload import Shape, Workload, workload
from grpo_actors.config import Config
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.process import bound_memory, run_command
from grpo_actors.rollout.worker import sampling_params

OURS, MLX_LM = "ours", "mlx-lm"


@dataclass(frozen=True, slots=True)
class Round:
    """Measurements of one round: all completions of a workload, sampled once."""

    #: Tokens of all completions.
    tokens: int
    seconds: float
    #: Seconds until each row had its first token: the prompts and one step.
    first_s: float
    #: Tokens of that first step.
    first_tokens: int
    #: Decoding steps, including the first.
    steps: int
    peak_bytes: int

    @property
    def step_s(self) -> float:
        """Mean seconds of a step after the first, including prompts that start later."""
        return (self.seconds - self.first_s) / (self.steps - 1)


class Sampling:
    """The policy and the workload of one process."""

    def __init__(self, config: Config, shape: Shape) -> None:
        """Load the policy."""
        self.policy = planned(rollout_policy(config))
        self.size = size_of(self.policy)
        self.work = workload(shape, self.policy.vocabulary)
        self.params = sampling_params(config)
        if shape.places is not None:
            longest = max(map(len, self.work.prompts)) + self.params.max_new_tokens
            self.params = replace(self.params, max_kv_tokens=shape.places * longest)

    def round(self, kind: str) -> Round:
        """Sample the whole workload once, with the sampler `kind`."""
        mx.reset_peak_memory()
        marks: list[tuple[float, int]] = []
        started_s = time.perf_counter()

        def mark(tokens: int) -> None:
            marks.append((time.perf_counter(), tokens))

        if kind == OURS:
            plan(self.policy, (length for group in self.work.lengths for length in group))
            seeds = [[1000 * i + j for j in range(len(group))] for i, group in enumerate(self.work.lengths)]
            sample_groups(self.policy, self.work.prompts, seeds, self.params, on_step=mark)
        else:
            generate(self.policy.model, self.work, self.params, mark)
        mx.synchronize()
        seconds = time.perf_counter() - started_s
        first_s, first_tokens = marks[0][0] - started_s, marks[0][1]
        tokens = sum(tokens for _, tokens in marks)
        return Round(tokens, seconds, first_s, first_tokens, len(marks), mx.get_peak_memory())


def generate(model: Any, work: Workload, params: SamplingParams, mark: Callable[[int], None]) -> None:
    """Sample with mlx-lm's `BatchGenerator`: same number of rows, lengths, temperature and filters."""
    generator = BatchGenerator(
        model,
        sampler=make_sampler(
            temp=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=params.top_k
        ),
        completion_batch_size=work.places,
        prefill_batch_size=work.places,
    )
    with contextlib.closing(generator):
        pairs = zip(work.prompts, work.lengths, strict=True)
        copies, limits = zip(*((prompt, n) for prompt, group in pairs for n in group), strict=True)
        generator.insert([list(prompt) for prompt in copies], max_tokens=list(limits))
        while answers := generator.next_generated():
            mark(len(answers))


def main() -> int:
    """Run one of several processes; its arguments are the settings and the shape, both as JSON."""
    bound_memory()
    sampling = Sampling(Config.model_validate_json(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
    reply(asdict(sampling.size))
    serve(lambda order: asdict(sampling.round(order["kind"])))
    return 0


if __name__ == "__main__":
    run_command(main)
