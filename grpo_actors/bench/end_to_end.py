"""Part ``end-to-end``: a real run of a few updates, measured by the run's own records.

The default task is arithmetic. With a random model or ``--prompt-tokens``, the prompts are chats of exactly that
many tokens, and a reward function written for this run gives every group a learning signal.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from grpo_actors.bench.figures import Figure
from grpo_actors.bench.launched import Launched
from grpo_actors.bench.options import PROMPT_TOKENS, Options, config_of
from grpo_actors.bench.workload import EQUAL, completion_lengths
from grpo_actors.config import Config
from grpo_actors.errors import ConfigError
from grpo_actors.observe.records import Record

#: Tokens that the embedded model's template adds to a text: start of the user turn, its end, start of the answer.
TEMPLATE_TOKENS = 3
PROBLEMS = 512
REWARD = """def alternating(completions, **columns):
    return [float(i % 2) for i in range(len(completions))]
"""

#: Row of the table -> its value in a record of an update; None or absent if not measured.
ROWS: dict[str, Callable[[Record], float | None]] = {
    "update s": lambda record: record["update_s"],
    "rollout tokens/s": lambda record: record["rollout_tokens_per_s"],
    "learner tokens/s": lambda record: record["learner_tokens_per_s"],
    "learner waited, share": lambda record: record.get(
        "learner_wait_share", record["wait_s"] / record["update_s"]
    ),
    "workers waited, share": lambda record: record.get("rollout_wait_share"),
    "completion tokens": lambda record: record["completion_length_mean"],
    "learner's peak memory GB": lambda record: record["memory_gb"],
}


def measure(options: Options, model_name: str) -> list[Figure]:
    """Measure this part; a round is an update."""
    settings = [
        f"max_updates={options.warmup + options.rounds}",
        "eval_every_updates=0",
        "save_steps=0",
        "lr_scheduler_type=constant",
    ]
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as name:
        folder = Path(name)
        if options.random or options.prompt_tokens:
            settings += _problems(folder, options)
        config = config_of(options, model_name, *settings)
        with Launched(config, folder, lengths=_lengths(options, config)) as run:
            run.wait()
            records = run.records("metrics")[options.warmup :]
    return figures(records)


def figures(records: Sequence[Record]) -> list[Figure]:
    """Return the rows of the table from the records of the measured updates."""
    columns = {row: [read(record) for record in records] for row, read in ROWS.items()}
    return [
        Figure(row, [value for value in values if value is not None])
        for row, values in columns.items()
        if None not in values
    ]


def write_problems(path: Path, tokens: int) -> None:
    """Write chats of exactly `tokens` tokens; in the embedded tokenizer a digit is one token."""
    digits = tokens - TEMPLATE_TOKENS
    if digits < 1:
        raise ConfigError(f"--prompt-tokens: must be at least {TEMPLATE_TOKENS + 1} here, got {tokens}")
    random = Random(0)
    with path.open("w") as file:
        for number in range(PROBLEMS):
            text = "".join(random.choices("0123456789", k=digits))
            line = {
                "id": str(number),
                "question": [{"role": "user", "content": text}],
                "answer": str(number),
            }
            file.write(json.dumps(line) + "\n")


def _lengths(options: Options, config: Config) -> str:
    """Return the distribution of the lengths as the run's workers read it, in their own working folder."""
    completion_lengths(1, config.rollout.max_new_tokens, options.lengths)  # raises if it is unusable
    if options.lengths != EQUAL and config.rollout.workers == 0:
        raise ConfigError(
            "--lengths: must be equal with rollout.workers = 0, where the learner itself samples"
        )
    return str(Path(options.lengths).absolute()) if Path(options.lengths).is_file() else options.lengths


def _problems(folder: Path, options: Options) -> list[str]:
    """Write the problems and the reward; returns the settings that name them."""
    problems, reward = folder / "problems.jsonl", folder / "rewards.py"
    write_problems(problems, options.prompt_tokens or PROMPT_TOKENS)
    reward.write_text(REWARD)
    return ["task=dataset", f"path={problems}", f'functions={{"{reward}:alternating"=1.0}}']
