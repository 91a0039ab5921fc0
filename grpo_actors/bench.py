"""How fast the parts of a run are here: ``python -m grpo_actors.bench [--model tiny] [--groups 8] [--against mlx-lm]``.

Medians over several rounds after one that does not count, on problems of the built-in task: sampling and the
gradient of what was sampled, one process each with all that it is given. No sockets, no other processes.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from grpo_actors.command import run_command
from grpo_actors.config import Config, load_config
from grpo_actors.groups import SampledCompletion, SampledGroup
from grpo_actors.grpo import Grpo
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.sampling import Sample, SamplingParams, sample_groups
from grpo_actors.policy.weights import freeze, pack, unpack
from grpo_actors.tasks.arithmetic import Arithmetic

CHUNK_BYTES = 2**21


def measure(config: Config, groups: int, rounds: int, *, against: bool = False) -> dict[str, float]:
    """Name -> figure: tokens/s of sampling and of training, seconds and bytes of one version's weights.

    Args:
        config: The model, the lengths and the batch.
        groups: Problems, each with `num_generations` completions.
        rounds: What is measured is the median of so many, after one that does not count.
        against: Sample with mlx-lm's `BatchGenerator` too, in turn with ours: the machine is then the same.
    """
    policy = load_policy(config.model, seed=0)
    problems = [Arithmetic(seed=0).problems("train")[i] for i in range(groups)]
    prompts = [policy.encode_chat(problem.messages) for problem in problems]
    seeds = [[100 * i + j for j in range(config.rollout.num_generations)] for i in range(groups)]
    params = SamplingParams(max_new_tokens=config.rollout.max_new_tokens)
    samples = sample_groups(policy, prompts, seeds, params)
    tokens = sum(len(sample.tokens) for group in samples for sample in group)
    theirs: list[float] = []

    def sample_in_turn() -> None:
        if against:
            theirs.append(mlx_lms_tokens_per_s(policy, prompts, config))

    sampling_s = _median_s(lambda: sample_groups(policy, prompts, seeds, params), rounds, then=sample_in_turn)
    batch = [
        SampledGroup(i, 0, problem, prompt, "bench", [_completion(policy, s, j) for j, s in enumerate(group)])
        for i, (problem, prompt, group) in enumerate(zip(problems, prompts, samples, strict=True))
    ]
    grpo = Grpo(config, policy, total_updates=10**6)
    update_s = _median_s(lambda: grpo.update(batch), rounds)
    places = tokens + sum(len(prompt) * config.rollout.num_generations for prompt in prompts)
    manifest, data = pack(freeze(1, policy.trainable()), CHUNK_BYTES)
    return {
        "rollout tokens/s": tokens / sampling_s,
        **({"mlx-lm tokens/s": median(theirs[1:])} if against else {}),
        "learner tokens/s": places / update_s,
        "update s": update_s,
        "weights MB": manifest.size / 1e6,
        "pack s": _median_s(lambda: pack(freeze(1, policy.trainable()), CHUNK_BYTES), rounds),
        "unpack s": _median_s(lambda: mx.eval(list(unpack(manifest, bytearray(data)).values())), rounds),
        "peak memory GB": mx.get_peak_memory() / 1e9,
    }


def mlx_lms_tokens_per_s(policy: Policy, prompts: Sequence[Sequence[int]], config: Config) -> float:
    """The rate of mlx-lm's `BatchGenerator` on the same completions, all side by side, at temperature 1."""
    copies = [list(prompt) for prompt in prompts for _ in range(config.rollout.num_generations)]
    generator = BatchGenerator(
        policy.model,
        max_tokens=config.rollout.max_new_tokens,
        stop_tokens=[[token] for token in policy.stop_tokens],
        sampler=make_sampler(temp=1.0),
        completion_batch_size=len(copies),
        prefill_batch_size=len(copies),
    )
    started_s, tokens = time.perf_counter(), 0
    generator.insert(copies)
    while answers := generator.next_generated():
        tokens += len(answers)
    mx.synchronize()
    generator.close()
    return tokens / (time.perf_counter() - started_s)


def _completion(policy: Policy, sample: Sample, number: int) -> SampledCompletion:
    """With a reward that alternates, so that every completion has an advantage and is computed."""
    reward: dict[str, float | None] = {"correctness": float(number % 2)}
    text = policy.decode(sample.tokens)
    return SampledCompletion(
        sample.tokens, sample.logprobs, [0] * len(sample.tokens), sample.finished, text, reward
    )


def _median_s(work: Callable[[], object], rounds: int, then: Callable[[], None] = lambda: None) -> float:
    """Seconds of `work`; `then` is done after each, and not counted."""
    seconds = []
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
        then()
    return median(seconds[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.bench", description="Measure sampling and training."
    )
    parser.add_argument("--model", default="tiny", help="as model.model_name")
    parser.add_argument("--groups", type=int, default=8, help="problems in a batch, of 8 completions each")
    parser.add_argument("--tokens", type=int, default=40, help="longest completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", choices=["mlx-lm"], help="sample with mlx-lm's BatchGenerator, too")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    settings = [f"model_name={given.model}", f"batch_size={given.groups}", "gradient_accumulation_steps=1"]
    settings += [
        f"max_new_tokens={given.tokens}",
        "task=arithmetic",
        "learning_rate=0.0",
        "functions={correctness=1.0}",
    ]
    config = load_config(None, settings).config
    figures = measure(config, given.groups, given.rounds, against=given.against is not None)
    if given.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name:<18}{value:>14,.3f}")
    return 0


if __name__ == "__main__":
    run_command(main)
