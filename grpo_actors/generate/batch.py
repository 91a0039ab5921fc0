"""Answer a file of prompts: sample many completions at a time and write them in the order in which they finish.

A batch that was killed at any moment continues when it is started again: completions in the output are not sampled
again, and all others are the same as without the interruption.
"""

import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grpo_actors.generate.generator import Generator
from grpo_actors.generate.output import Output
from grpo_actors.generate.prompts import Request
from grpo_actors.policy.decoding.sampling import Submission, sample_in_turn


@dataclass(frozen=True, slots=True)
class Todo:
    """A prompt and its missing samples."""

    request: Request
    #: Token ids, four bytes each, because the prompts of a whole file are kept in memory.
    tokens: "array[int]"
    samples: Sequence[int]


def encode_all(generator: Generator, requests: Sequence[Request]) -> list["array[int]"]:
    """Return the token ids of every prompt.

    Raises:
        DataError: a prompt is too long to leave space for an answer; the text names its line.
    """
    return [array("I", generator.encode_fitting(request.prompt, request.where)) for request in requests]


def run_batch(
    generator: Generator,
    requests: Sequence[Request],
    prompts: Sequence["array[int]"],
    output: Output,
    *,
    samples: int,
    rows: int,
) -> None:
    """Sample the completions that `output` lacks.

    Args:
        generator: The policy and its sampling settings.
        requests: All requests of the input, in its order.
        prompts: The token ids of each request.
        output: The file of results.
        samples: Completions of each prompt.
        rows: Rows of the decoding batch: completions sampled at the same time.
    """
    todo = {
        request.index: Todo(request, tokens, missing)
        for request, tokens in zip(requests, prompts, strict=True)
        if (missing := [number for number in range(samples) if (request.index, number) not in output.done])
    }
    total = len(requests) * samples
    left = sum(len(each.samples) for each in todo.values())
    _print_progress(output, total - left, total)
    started_s, tokens = time.monotonic(), 0
    with _bar() as bar:
        task = bar.add_task("", total=total, completed=total - left, rate="")

        def on_step(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(task, rate=f"{tokens / (time.monotonic() - started_s):,.1f} tokens/s")

        for index, group in sample_in_turn(
            generator.policy, _submissions(generator, todo, samples), generator.params, rows, on_step
        ):
            each = todo[index]
            own_id = {} if each.request.id is None else {"id": each.request.id}
            output.write(
                own_id | generator.record(index, number, len(each.tokens), sample)
                for number, sample in zip(each.samples, group, strict=True)
            )
            bar.advance(task, len(group))
    seconds = time.monotonic() - started_s
    print(
        f"{left} completions, {tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)",
        file=sys.stderr,
    )


def _submissions(generator: Generator, todo: dict[int, Todo], samples: int) -> Iterator[Submission]:
    for index, each in todo.items():
        seeds = generator.seeds(index, samples)
        yield Submission(index, each.tokens, [seeds[number] for number in each.samples])


def _print_progress(output: Output, done: int, total: int) -> None:
    if output.mended:
        print("the last line of the output was cut in the middle; it is sampled again", file=sys.stderr)
    if done:
        print(f"{done} of {total} completions are there already", file=sys.stderr)


def _bar() -> Progress:
    """Build a progress bar on standard error; disabled if that is not a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
