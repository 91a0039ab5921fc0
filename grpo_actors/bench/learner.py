"""Part ``learner``: seconds, tokens a second and memory of an update. Completions are random ids, not samples.

With ``--set ranks=2``, two processes share the update, and the memory is that of rank 0; with ``divide_model=true``, too.
"""

import time
from math import log

import mlx.core as mx

from grpo_actors.bench.figures import Figure
from grpo_actors.bench.floors import update_floor_s
from grpo_actors.bench.options import Options, config_of, shape_of
from grpo_actors.bench.peak_rates import rates
from grpo_actors.bench.policies import dtype_of, size_of
from grpo_actors.bench.workload import Workload, workload
from grpo_actors.consent import as_options, code_of_model
from grpo_actors.learner.following import check_together, give_state
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.ranks import joined
from grpo_actors.policy.model import load_policy
from grpo_actors.ranks.processes import ranks_here, started
from grpo_actors.tasks.task import Problem


def measure(options: Options, model_name: str) -> list[Figure]:
    """Measure this part. An update of num_iterations passes counts as that many times the work."""
    # With a learning rate of 0 every round is the same update.
    config = config_of(options, model_name, "learning_rate=0.0", "functions={correctness=1.0}")
    # They know no run folder.
    others = ["grpo_actors.learner", "none", *as_options(code_of_model(config.model))]
    with (
        started(ranks_here(config.learner.ranks), others, "learner.ranks"),
        joined(config) as ranks,
    ):
        policy = load_policy(config.model, seed=config.run.seed, group=ranks.collectives)
        size = size_of(policy)
        machine = rates(dtype_of(policy))
        work = workload(shape_of(options, config), policy.vocabulary)
        groups = sampled_groups(work, policy.vocabulary)
        grpo = Grpo(config, policy, total_updates=10**6, ranks=ranks)
        give_state(grpo)
        if ranks.collectives is not None:  # the other ranks expect what a run does
            check_together(grpo, groups[0].prompt)
            grpo.warm_up()
        grpo.update(groups)
        mx.reset_peak_memory()
        seconds = []
        for _ in range(options.rounds):
            started_s = time.perf_counter()
            grpo.update(groups)
            seconds.append(time.perf_counter() - started_s)
    sequences = sequence_lengths(work)
    passes = config.learner.num_iterations
    floor_s = (
        passes * update_floor_s(size, machine, sequences, adapter=policy.has_adapter) / config.learner.ranks
    )
    tokens = passes * sum(sequences)
    return [
        Figure("update s", seconds, floor_s),
        Figure("tokens/s", [tokens / update_s for update_s in seconds], tokens / floor_s, is_rate=True),
        Figure("tokens an update", [tokens]),
        Figure("peak memory GB", [mx.get_peak_memory() / 1e9]),
    ]


def sequence_lengths(work: Workload) -> list[int]:
    """Return the length of each prompt plus completion, which is the work of a plain pass."""
    return [
        len(prompt) + length
        for prompt, group in zip(work.prompts, work.lengths, strict=True)
        for length in group
    ]


def sampled_groups(work: Workload, vocabulary: int) -> list[SampledGroup]:
    """Build the workload's groups for the learner, with alternating rewards: every completion has an advantage."""
    keys = iter(range(sum(map(len, work.lengths))))

    def completion(length: int, reward: float) -> SampledCompletion:
        drawn = mx.random.randint(0, vocabulary, (length,), key=mx.random.key(next(keys)))
        tokens: list[int] = drawn.tolist()  # type: ignore[assignment]
        # Random ids have the log-probs of a uniform distribution.
        logprobs = [-log(vocabulary)] * length
        return SampledCompletion(tokens, logprobs, [0] * length, True, {"correctness": reward})

    return [
        SampledGroup(
            i,
            0,
            Problem(f"bench/{i}", (), ""),
            prompt,
            "bench",
            [completion(length, float(j % 2)) for j, length in enumerate(group)],
        )
        for i, (prompt, group) in enumerate(zip(work.prompts, work.lengths, strict=True))
    ]
