"""The evaluator alone: what the command line asks for is examined, shown, drawn and written down."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

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
from grpo_actors.evaluator.comparison.files import append_answers, chosen_file, refuse_to_replace, writing
from grpo_actors.evaluator.comparison.picture import check_picture, draw
from grpo_actors.evaluator.comparison.result import Pair, Result, Sheet, compare
from grpo_actors.evaluator.comparison.table import as_sentence, as_table
from grpo_actors.evaluator.score import max_answer_tokens
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import open_scorer


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; None: not given."""

    checkpoints: Sequence[str]
    config: str | None = None
    overrides: Sequence[str] = ()
    #: Problems; 0: all.
    samples: int | None = None
    #: Samples a problem.
    k: int | None = None
    temperature: float | None = None
    compare: tuple[str, str] | None = None
    answers: Path | None = None
    plot: Path | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if not self.checkpoints and not self.compare:
            raise ConfigError("name a checkpoint, a run folder or a model, or two of them after --compare")
        if self.k is not None and self.k < 1:
            raise ConfigError(
                f"--k: must be ≥ 1 (samples a problem; leave it out for greedy alone), got {self.k}"
            )
        if self.temperature is not None and self.k is None:
            raise ConfigError("--temperature: is that of the samples of --k, which is not given; add --k N")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"--temperature: must be > 0 (greedy is always scored), got {self.temperature}")
        if self.plot is not None:
            check_picture(self.plot)  # one that is there is drawn anew: it shows what the table says
        if self.answers is not None:
            refuse_to_replace(self.answers, "--answers")

    @property
    def settings(self) -> list[str]:
        """The overrides, what the command line has an option for among them."""
        own = [] if self.temperature is None else [f"evaluator.eval_temperature={self.temperature}"]
        return [*self.overrides, *own]


def evaluate_alone(options: Options, stop: StopRequest) -> int:
    """Examine what the options name and print what came out; returns the exit code.

    Raises:
        GrpoActorsError: one line that says what is unusable. Then no file is written.
    """
    candidates = find_candidates(options.checkpoints)
    pair = None if options.compare is None else _compared(options.compare, candidates)
    config = settings_of(candidates, options.config, options.settings)
    with ExitStack() as files:
        answers = options.answers and files.enter_context(chosen_file(options.answers, "--answers"))
        picture = options.plot and files.enter_context(chosen_file(options.plot, "--plot"))
        results, sheets = _examine(options, candidates, config, pair=pair, answers=answers, stop=stop)
        comparison = _compare(pair, sheets) if pair else None
        # Before anything that a full disk could spoil.
        print((_as_json if options.json else _as_text)(results, comparison, config), flush=True)
        if picture and options.plot:
            with writing(options.plot, "--plot"):
                draw(results, picture, options.plot.suffix)
    return 0


def _examine(
    options: Options,
    candidates: Sequence[Candidate],
    config: Config,
    *,
    pair: tuple[Candidate, Candidate] | None,
    answers: Path | None,
    stop: StopRequest,
) -> tuple[list[Result], dict[Candidate, Sheet]]:
    """A result for each candidate, and all that the two of the pair answered; everybody's answers go to the file."""
    task = load_task(config.data, seed=config.run.seed)
    k = int(config.evaluator.eval_sampled) if options.k is None else options.k
    rewards = chosen_rewards(config.reward.functions, task)
    results: list[Result] = []
    sheets: dict[Candidate, Sheet] = {}

    def load(candidate: Candidate) -> Policy:
        # Its own run says what it is, whatever --config says of what all are asked.
        file = None if candidate.has_settings else options.config
        return load_candidate(candidate, settings_of([candidate], file, options.settings))

    with open_scorer(rewards, config.reward) as scorer:
        exam = Exam(task, config, scorer, options.samples, k, stop)
        for candidate, sheet, result in exam.take(candidates, load):
            results.append(result)
            if answers:
                append_answers(answers, candidate, sheet)
            if pair and candidate in pair:
                sheets[candidate] = sheet
    return results, sheets


def _compared(names: tuple[str, str], candidates: list[Candidate]) -> tuple[Candidate, Candidate]:
    """The two that ``--compare`` means; one that is not in `candidates` yet is added."""
    first, second = (_one(name, candidates) for name in names)
    if first == second:
        raise ConfigError(f"--compare: must name two different checkpoints, got {first.name} twice")
    return first, second


def _one(name: str, candidates: list[Candidate]) -> Candidate:
    known = pick(name, candidates)
    if known is not None:
        return known
    if candidates and not Path(name).exists() and "/" not in name:
        raise ConfigError(
            f"--compare: {name} is none of {', '.join(s.name for s in candidates)}, and no folder"
        )
    found = find_candidates([name])
    if len(found) > 1:
        raise ConfigError(f"--compare: {name} is a run; name one of its checkpoints, as {found[-1].name}")
    for candidate in candidates:
        if candidate.key == found[0].key:
            return candidate
    candidates += found
    return found[0]


def _compare(pair: tuple[Candidate, Candidate], sheets: Mapping[Candidate, Sheet]) -> Pair:
    first, second = pair
    return compare((first.name, second.name), sheets[first], sheets[second])


def _as_text(results: Sequence[Result], comparison: Pair | None, config: Config) -> str:
    table = as_table(results, config.data.task, max_answer_tokens(config))
    return table if comparison is None else f"{table}\n\n{as_sentence(comparison)}"


def _as_json(results: Sequence[Result], comparison: Pair | None, config: Config) -> str:
    document = {
        "task": config.data.task,
        "max_new_tokens": max_answer_tokens(config),
        "checkpoints": [asdict(result) for result in results],
        "comparison": None if comparison is None else asdict(comparison),
    }
    return json.dumps(document, indent=2)
