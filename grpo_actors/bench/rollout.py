"""Part ``rollout``: tokens a second of sampling, with ``--against mlx-lm`` next to mlx-lm's own batches.

With ``--processes N`` the same work runs in N processes at the same time, like the workers of one GPU.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from grpo_actors.backend import submit_long_graphs
from grpo_actors.bench.bench_process import BenchProcess, ask_all
from grpo_actors.bench.figures import Figure
from grpo_actors.bench.floors import ModelSize, RolloutFloor, rollout_floor
from grpo_actors.bench.options import Options, config_of, shape_of
from grpo_actors.bench.peak_rates import rates
from grpo_actors.bench.sampling_process import MLX_LM, OURS, Round, Sampling
from grpo_actors.bench.workload import Shape, workload
from grpo_actors.config import Config
from grpo_actors.policy.model import DTYPES

#: Runs one round with the given sampler (`OURS` or `MLX_LM`) in all processes at the same time.
RunRound = Callable[[str], list[Round]]


def measure(options: Options, model_name: str) -> list[Figure]:
    """Measure this part."""
    submit_long_graphs()  # as a worker does; child processes inherit it
    config = config_of(options, model_name)
    shape = shape_of(options, config)
    rounds: dict[str, list[list[Round]]] = {OURS: [], MLX_LM: []} if options.against else {OURS: []}
    with _processes(options.processes, config, shape) as (size, run_round):
        machine = rates(DTYPES[size.dtype])
        for _ in range(options.rounds + 1):
            # The samplers alternate, so that both meet the machine in the same state.
            for kind, measured in rounds.items():
                measured.append(run_round(kind))
    work = workload(shape, vocabulary=1)  # only its lengths are used
    floor = rollout_floor(size, machine, [len(prompt) for prompt in work.prompts], work.lengths, work.places)
    # The first round is a warm-up.
    return figures({kind: measured[1:] for kind, measured in rounds.items()}, floor, work.tokens)


@contextmanager
def _processes(count: int, config: Config, shape: Shape) -> Iterator[tuple[ModelSize, RunRound]]:
    """Yield the model's size and a function that runs one round, in this process or in `count` others."""
    if count == 1:
        sampling = Sampling(config, shape)
        yield sampling.size, lambda kind: [sampling.round(kind)]
        return
    arguments = (config.model_dump_json(), json.dumps(asdict(shape)))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                BenchProcess("grpo_actors.bench.sampling_process", *arguments, processes=count)
            )
            for _ in range(count)
        ]
        hellos = [process.answer() for process in processes]
        yield (
            ModelSize(**hellos[0]),
            lambda kind: [Round(**answer) for answer in ask_all(processes, {"kind": kind})],
        )


def figures(
    rounds: Mapping[str, Sequence[Sequence[Round]]], floor: RolloutFloor, tokens: int
) -> list[Figure]:
    """Return the rows of the table.

    Args:
        rounds: Sampler -> rounds -> processes, which all ran at the same time.
        floor: Floor of one process.
        tokens: Tokens of all completions of one process.
    """
    shown = [row for kind, measured in rounds.items() for row in _rows(kind, measured, floor, tokens)]
    if MLX_LM in rounds:
        ours, theirs = (map(_rate, rounds[kind]) for kind in (OURS, MLX_LM))
        shown.append(Figure("ours ÷ mlx-lm", [one / other for one, other in zip(ours, theirs, strict=True)]))
    processes = len(rounds[OURS][0])
    return [*shown, Figure("tokens a round", [processes * tokens])]


def _rows(kind: str, measured: Sequence[Sequence[Round]], floor: RolloutFloor, tokens: int) -> list[Figure]:
    """Return one sampler's rows.

    The processes share the machine: the floor of their added rates is that of one process, and the floor of a
    process's time is that of one process alone times their number.
    """
    prefix, processes = "" if kind == OURS else f"{kind} ", len(measured[0])

    def row(what: str, values: list[float], best: float | None = None, *, is_rate: bool = False) -> Figure:
        return Figure(prefix + what, values, best, is_rate)

    best, best_decode = tokens / (floor.prefill_s + floor.decode_s), tokens / floor.decode_s
    step_ms = 1000 * processes * floor.decode_s / floor.steps
    return [
        row("tokens/s", [_rate(each) for each in measured], best, is_rate=True),
        row("decode tokens/s", [_decode_rate(each) for each in measured], best_decode, is_rate=True),
        row("ms a step", [1000 * max(r.step_s for r in each) for each in measured], step_ms),
        row(
            "first token s", [max(r.first_s for r in each) for each in measured], processes * floor.prefill_s
        ),
        row("steps", [max(r.steps for r in each) for each in measured], floor.steps),
        row("peak memory GB", [sum(r.peak_bytes for r in each) / 1e9 for each in measured]),
    ]


def _rate(parallel: Sequence[Round]) -> float:
    return sum(r.tokens / r.seconds for r in parallel)


def _decode_rate(parallel: Sequence[Round]) -> float:
    return sum((r.tokens - r.first_tokens) / (r.seconds - r.first_s) for r in parallel)
