"""Evaluate the checkpoints that the command line names; print, plot and save the results."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.candidates import (
    Candidate,
    find_candidates,
    load_candidate,
    pick,
    settings_of,
)
from grpo_actors.evaluator.comparison.exam import Exam
from grpo_actors.evaluator.comparison.files import (
    append_answers,
    as_config_error,
    chosen_file,
    refuse_to_replace,
)
from grpo_actors.evaluator.comparison.picture import check_picture, draw
from grpo_actors.evaluator.comparison.result import Answers, Pair, Result, compare
from grpo_actors.evaluator.comparison.table import as_sentence, as_table
from grpo_actors.evaluator.score import max_answer_tokens
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest
from grpo_actors.rundir.claim import with_rewards
from grpo_actors.rundir.data import common_system_prompt
from grpo_actors.rundir.prompting import notice
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.scoring import open_scorer

_results = TypeAdapter(list[Result])
_comparison = TypeAdapter(Pair | None)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line; None if not given."""

    checkpoints: Sequence[str]
    config: str | None = None
    overrides: Sequence[str] = ()
    #: Number of problems; 0: all.
    samples: int | None = None
    #: Number of samples per problem.
    k: int | None = None
    #: Temperature of these samples.
    temperature: float | None = None
    compare: tuple[str, str] | None = None
    #: File for the answers.
    answers: Path | None = None
    #: File for the plot.
    plot: Path | None = None
    json: bool = False
    #: Whether to leave out the system prompt of the training.
    no_system: bool = False
    #: Names of the code that the settings of runs may run (`consent`).
    allow: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.checkpoints and not self.compare:
            raise ConfigError("name a checkpoint, a run folder or a model, or two of them after --compare")
        if self.k is not None and self.k < 1:
            raise ConfigError(
                f"--k: must be ≥ 1 (samples per problem; leave it out for greedy answers only), got {self.k}"
            )
        if self.temperature is not None and self.k is None:
            raise ConfigError("--temperature: applies to the samples of --k, which is not given; add --k N")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"--temperature: must be > 0 (greedy is always scored), got {self.temperature}")
        if self.plot is not None:
            check_picture(self.plot)  # an existing plot is replaced: it only shows what the table says
        if self.answers is not None:
            refuse_to_replace(self.answers, "--answers")

    @property
    def settings(self) -> list[str]:
        """The overrides, including those that the command line has an option for."""
        own = [] if self.temperature is None else [f"evaluator.eval_temperature={self.temperature}"]
        return [*self.overrides, *own, *(["data.system_prompt="] if self.no_system else [])]


def evaluate_checkpoints(options: Options, stop: StopRequest) -> int:
    """Evaluate the checkpoints that the options name and print the results; return the exit code.

    Raises:
        GrpoActorsError: Something is unusable; one line says what. No file is written then.
    """
    candidates = find_candidates(options.checkpoints)
    pair = None if options.compare is None else _find_pair(options.compare, candidates)
    config = settings_of(candidates, options.config, options.settings, allowed=options.allow)
    with ExitStack() as files:
        answers_file = options.answers and files.enter_context(chosen_file(options.answers, "--answers"))
        plot_file = options.plot and files.enter_context(chosen_file(options.plot, "--plot"))
        results, answers = _evaluate(
            options, candidates, config, pair=pair, answers_file=answers_file, stop=stop
        )
        comparison = _compare(pair, answers) if pair else None
        # Print first: a full disk may make the plot fail.
        print((_as_json if options.json else _as_text)(results, comparison, config), flush=True)
        if plot_file and options.plot:
            with as_config_error(options.plot, "--plot"):
                draw(results, plot_file, options.plot.suffix)
    return 0


def results_of(options: Options) -> list[Result]:
    """Return the results of the checkpoints that the options name; print and write nothing.

    Raises:
        GrpoActorsError: Something is unusable; one line says what.
    """
    candidates = find_candidates(options.checkpoints)
    config = settings_of(candidates, options.config, options.settings, allowed=options.allow)
    results, _ = _evaluate(options, candidates, config, stop=StopRequest())
    return results


def _evaluate(
    options: Options,
    candidates: Sequence[Candidate],
    config: Config,
    *,
    pair: tuple[Candidate, Candidate] | None = None,
    answers_file: Path | None = None,
    stop: StopRequest,
) -> tuple[list[Result], dict[Candidate, Answers]]:
    """Return a result for each candidate, and the answers of the two in `pair`; write all answers to the file."""
    task = open_task(config)
    config = with_rewards(config, task)
    if system := common_system_prompt(task.problems("eval")):
        print(notice(system), file=sys.stderr)
    k = int(config.evaluator.eval_sampled) if options.k is None else options.k
    results: list[Result] = []
    answers_of_pair: dict[Candidate, Answers] = {}

    def load(candidate: Candidate) -> Policy:
        # A candidate is loaded by its own run's settings, even if --config gives the settings of the evaluation.
        file = None if candidate.has_settings else options.config
        own = settings_of([candidate], file, options.settings, allowed=options.allow, only_loads=True)
        return load_candidate(candidate, own)

    with open_scorer(config) as scorer:
        scorer.check_columns(task)
        exam = Exam(task, config, scorer, options.samples, k, stop)
        for candidate, answers, result in exam.run(candidates, load):
            results.append(result)
            if answers_file:
                append_answers(answers_file, candidate, answers)
            if pair and candidate in pair:
                answers_of_pair[candidate] = answers
    return results, answers_of_pair


def _find_pair(names: tuple[str, str], candidates: list[Candidate]) -> tuple[Candidate, Candidate]:
    """Return the two candidates of ``--compare``; add those that are not in `candidates` yet."""
    first, second = (_find_or_add(name, candidates) for name in names)
    if first == second:
        raise ConfigError(f"--compare: must name two different checkpoints, got {first.name} twice")
    return first, second


def _find_or_add(name: str, candidates: list[Candidate]) -> Candidate:
    known = pick(name, candidates)
    if known is not None:
        return known
    if candidates and not Path(name).exists() and "/" not in name:
        raise ConfigError(
            f"--compare: {name} is none of {', '.join(c.name for c in candidates)}, and no folder"
        )
    found = find_candidates([name])
    if len(found) > 1:
        raise ConfigError(f"--compare: {name} is a run; name one of its checkpoints, as {found[-1].name}")
    for candidate in candidates:
        if candidate.key == found[0].key:
            return candidate
    candidates += found
    return found[0]


def _compare(pair: tuple[Candidate, Candidate], answers: Mapping[Candidate, Answers]) -> Pair:
    first, second = pair
    return compare((first.name, second.name), answers[first], answers[second])


def _as_text(results: Sequence[Result], comparison: Pair | None, config: Config) -> str:
    table = as_table(results, config.data.title, max_answer_tokens(config))
    return table if comparison is None else f"{table}\n\n{as_sentence(comparison)}"


def _as_json(results: Sequence[Result], comparison: Pair | None, config: Config) -> str:
    document = {
        "task": config.data.title,
        "max_new_tokens": max_answer_tokens(config),
        "checkpoints": _results.dump_python(list(results)),
        "comparison": _comparison.dump_python(comparison),
    }
    return json.dumps(document, indent=2)
