"""Part ``rollout``: tokens a second of sampling, beside mlx-lm's own batches if asked for.

With ``--processes N`` the same runs in N processes at once, as the workers of one GPU do.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from grpo_actors.backend import submit_long_graphs
from grpo_actors.bench.companion import Companion, all_answers
from grpo_actors.bench.figures import Figure
from grpo_actors.bench.floors import ModelSize, RolloutFloor, rollout_floor
from grpo_actors.bench.options import Options, config_of, shape_of
from grpo_actors.bench.peak_rates import rates
from grpo_actors.bench.sampling_process import MLX_LM, OURS, Round, Sampling
from grpo_actors.bench.workload import Shape, workload
from grpo_actors.config import Config
from grpo_actors.policy.model import DTYPES

#: Ours or theirs -> a round of each process, all at once.
Once = Callable[[str], list[Round]]


def measure(options: Options, model_name: str) -> list[Figure]:
    """The figures of this part."""
    submit_long_graphs()  # as a worker does; other processes inherit it
    config = config_of(options, model_name)
    shape = shape_of(options, config)
    rounds: dict[str, list[list[Round]]] = {OURS: [], MLX_LM: []} if options.against else {OURS: []}
    with _processes(options.processes, config, shape) as (size, once):
        machine = rates(DTYPES[size.dtype])
        for _ in range(options.rounds + 1):
            # In turn: the machine is then the same for both.
            for kind, told in rounds.items():
                told.append(once(kind))
    work = workload(shape, vocabulary=1)  # for its lengths
    floor = rollout_floor(size, machine, [len(prompt) for prompt in work.prompts], work.lengths, work.places)
    return figures({kind: told[1:] for kind, told in rounds.items()}, floor, work.tokens)


@contextmanager
def _processes(count: int, config: Config, shape: Shape) -> Iterator[tuple[ModelSize, Once]]:
    """What they sample, and how to have them do it: this process alone, or so many others."""
    if count == 1:
        sampling = Sampling(config, shape)
        yield sampling.size, lambda kind: [sampling.round(kind)]
        return
    arguments = (config.model_dump_json(), json.dumps(asdict(shape)))
    with ExitStack() as stack:
        companions = [
            stack.enter_context(Companion("grpo_actors.bench.sampling_process", *arguments, processes=count))
            for _ in range(count)
        ]
        hellos = [companion.answer() for companion in companions]
        yield (
            ModelSize(**hellos[0]),
            lambda kind: [Round(**answer) for answer in all_answers(companions, {"kind": kind})],
        )


def figures(
    rounds: Mapping[str, Sequence[Sequence[Round]]], floor: RolloutFloor, tokens: int
) -> list[Figure]:
    """Rows of the table.

    Args:
        rounds: Ours or theirs -> by round -> by process, which all ran at once.
        floor: Of one process.
        tokens: Of one process's completions.
    """
    shown = [row for kind, told in rounds.items() for row in _rows(kind, told, floor, tokens)]
    if MLX_LM in rounds:
        ours, theirs = (map(_rate, rounds[kind]) for kind in (OURS, MLX_LM))
        shown.append(Figure("ours ÷ mlx-lm", [one / other for one, other in zip(ours, theirs, strict=True)]))
    processes = len(rounds[OURS][0])
    return [*shown, Figure("tokens a round", [processes * tokens])]


def _rows(kind: str, told: Sequence[Sequence[Round]], floor: RolloutFloor, tokens: int) -> list[Figure]:
    """What processes share bounds all of them together as it bounds one; each has its part of it."""
    whose, processes = "" if kind == OURS else f"{kind} ", len(told[0])

    def row(what: str, values: list[float], best: float | None = None, *, is_rate: bool = False) -> Figure:
        return Figure(whose + what, values, best, is_rate)

    best, best_decode = tokens / (floor.prefill_s + floor.decode_s), tokens / floor.decode_s
    step_ms = 1000 * processes * floor.decode_s / floor.steps
    return [
        row("tokens/s", [_rate(each) for each in told], best, is_rate=True),
        row("decode tokens/s", [_decode_rate(each) for each in told], best_decode, is_rate=True),
        row("ms a step", [1000 * max(r.step_s for r in each) for each in told], step_ms),
        row("first token s", [max(r.first_s for r in each) for each in told], processes * floor.prefill_s),
        row("steps", [max(r.steps for r in each) for each in told], floor.steps),
        row("peak memory GB", [sum(r.peak_bytes for r in each) / 1e9 for each in told]),
    ]


def _rate(parallel: Sequence[Round]) -> float:
    return sum(r.tokens / r.seconds for r in parallel)


def _decode_rate(parallel: Sequence[Round]) -> float:
    return sum((r.tokens - r.first_tokens) / (r.seconds - r.first_s) for r in parallel)
