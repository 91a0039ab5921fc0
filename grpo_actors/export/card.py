"""Write the model card of an exported policy: its base, its training data and objective, and its scores.

This module reads a run folder's files and loads no model. The card contains no local paths: folders and files are
given by name only.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from grpo_actors.config import Config
from grpo_actors.config.advice import without_effect
from grpo_actors.config.wording import toml_value
from grpo_actors.errors import ModelError
from grpo_actors.observe.follow import HistoryReader
from grpo_actors.observe.records import Record
from grpo_actors.policy.locate import locate
from grpo_actors.policy.tokenizer_files import TEMPLATE
from grpo_actors.rundir.checkpoints import Checkpoint
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE, EVALUATION_FILE
from grpo_actors.rundir.prompting import Prompting, prompting_of_run
from grpo_actors.rundir.scores import read_score
from grpo_actors.score import verdict
from grpo_actors.tasks.gsm8k import HUB_ID

#: What a card describes.
Form = Literal["model", "adapter", "peft adapter"]

#: Rows of the table of scores: title, field, decimals; None: the value is a share.
_SCORES = (
    ("accuracy, greedy", "accuracy", None),
    ("accuracy, sampled", "sampled_accuracy", None),
    ("reward, greedy", "reward", 3),
    ("reward, sampled", "sampled_reward", 3),
    ("answers cut", "truncated_share", None),
    ("tokens an answer", "completion_length_mean", 0),
)


def card(run_dir: Path, config: Config, checkpoint: Checkpoint, *, name: str, form: Form) -> str:
    """Return the text of README.md.

    Args:
        run_dir: The run folder.
        config: The run's settings.
        checkpoint: The exported checkpoint.
        name: The name of the exported model.
        form: What is exported.
    """
    start = _start(run_dir)
    parts = [
        _front_matter(config, form),
        f"# {name}",
        _sentence(config, checkpoint),
        _scores(run_dir, config, checkpoint),
        "## Objective\n\n" + _table(_objective(config)),
        "## Data and rewards\n\n" + _table(_data(config, start)),
        "## Training\n\n" + _table(_training(config)),
        _made_by(start),
    ]
    parts.append(f"## Use\n\n```python\n{_use(config, name, form)}\n```")
    parts.append(_prompt(prompting_of_run(run_dir), form))
    return "\n\n".join(parts) + "\n"


def _use(config: Config, name: str, form: Form) -> str:
    if form == "peft adapter":
        call = f'AutoPeftModelForCausalLM.from_pretrained("{name}")'
        return f"from peft import AutoPeftModelForCausalLM\n\nmodel = {call}"
    call = f'"{base_name(config)}", adapter_path="{name}"' if form == "adapter" else f'"{name}"'
    return f"from mlx_lm import load\n\nmodel, tokenizer = load({call})"


def _objective(config: Config) -> dict[str, Any]:
    """Return the settings of the objective that have an effect with the others."""
    unread = {key.partition(".")[2] for key in without_effect(config) if key.startswith("objective.")}
    return config.objective.model_dump(exclude={"algorithm", *unread})


def _prompt(prompting: Prompting, form: Form) -> str:
    """Say with which prompt it was trained, and who adds it."""
    if not prompting.system and not prompting.template_settings:
        return "It was trained without a system prompt."
    given = []
    if prompting.system:
        given.append(f"this system prompt:\n\n```text\n{prompting.system}\n```")
    if prompting.template_settings:
        settings = json.dumps(dict(prompting.template_settings), ensure_ascii=False)
        given.append(f"these variables of the chat template: `{settings}`.")
    adds = "The chat template adds it to a chat that has none; the variable `no_system` turns that off."
    if form != "model":
        adds = f"`{TEMPLATE}` in this folder adds it; with the base's own template, give it yourself."
    # A code block ends at a line of its own.
    told = "\n\nAnd with ".join(given)
    return f"It was trained with {told}\n\n{adds}"


def base_name(config: Config) -> str:
    """Return the base model's hub id, or the name of its folder."""
    return _hub_id(config) or Path(config.model.model_name).name


def _hub_id(config: Config) -> str | None:
    try:
        where = locate(config.model.model_name)
    except ModelError:  # the folder is gone; a fully trained model does not need it
        return None
    return where if isinstance(where, str) else None


def _front_matter(config: Config, form: Form) -> str:
    """Return the YAML header that the hub reads. JSON strings are valid YAML; the hub rejects a base without hub id."""
    lines = []
    if hub_id := _hub_id(config):
        relation = "finetune" if form == "model" else "adapter"
        lines += [f"base_model: {json.dumps(hub_id)}", f"base_model_relation: {relation}"]
    if config.data.task == "gsm8k" and not config.data.sources:
        lines.append(f"datasets:\n- {HUB_ID}")
    library = "peft" if form == "peft adapter" else "mlx"
    lines += [f"library_name: {library}", "pipeline_tag: text-generation"]
    lines.append("tags:\n- grpo\n- reinforcement-learning\n- mlx")
    return "---\n" + "\n".join(lines) + "\n---"


def _sentence(config: Config, checkpoint: Checkpoint) -> str:
    return (
        f"{base_name(config)}, trained with reinforcement learning (GRPO) on {_task(config)}: {checkpoint.update} "
        f"updates of {config.groups_per_update} problems × {config.rollout.num_generations} completions."
    )


def _task(config: Config) -> str:
    path = config.data.path
    return config.data.title + (f" ({Path(path).name})" if path else "")


def _scores(run_dir: Path, config: Config, checkpoint: Checkpoint) -> str:
    after = read_score(checkpoint.path / EVALUATION_FILE)
    if after is None:
        return "It has not been evaluated."
    before, report = read_score(run_dir / BASE_EVALUATION_FILE), after.report
    measure = report.score.measure
    # Scores that were measured differently are not put side by side.
    of_base = before.report.model_dump() if before and before.report.score.measure == measure else {}
    rows = [f"| | base | update {checkpoint.update} |", "|---|---|---|"]
    for title, key, decimals in _SCORES:
        cells = [_score(scores, key, decimals) for scores in (of_base, report.model_dump())]
        if any(cells):
            rows.append(f"| {title} | {' | '.join(cell or '?' for cell in cells)} |")
    problems, limit = f"{measure.problems:,} held-out problems of {_task(config)}", measure.max_new_tokens
    on = f"On {problems}, answered in at most {limit:,} tokens, with 95 % intervals."
    chosen = f"Chosen by {measure.metric}, {measure.how}: {report.score}{verdict(report.gain)}."
    return "\n".join([*rows, "", on, chosen])


def _score(scores: Mapping[str, Any], key: str, decimals: int | None) -> str:
    """Format ``91.0 % (88.9 to 92.7)``; empty if not measured."""
    value = scores.get(key)
    if value is None:
        return ""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    low = scores.get(f"{key}_low")
    interval = "" if low is None else f" ({100 * low:.1f} to {100 * scores[f'{key}_high']:.1f})"
    return f"{100 * value:.1f} %{interval}"


def _data(config: Config, start: Record) -> dict[str, Any]:
    """Return the data settings and the rewards; if the settings name no rewards, those that the task chose."""
    kept = {"task", "num_shots", "max_train_samples", "max_prompt_length", "system_prompt"}
    settings = config.data.model_dump(include=kept) | {"file": Path(config.data.path).name or None}
    rewards = start.get("config", {}).get("reward", {}).get("functions") or config.reward.functions
    return settings | {f"reward {name}": weight for name, weight in rewards.items()}


def _training(config: Config) -> dict[str, Any]:
    model = {"dtype", "fine_tune_type"}
    if config.model.fine_tune_type != "full":
        model |= {"base_bits", "lora_rank", "lora_scale", "lora_dropout", "lora_layers", "lora_keys"}
    rollout = {"num_generations", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "max_staleness"}
    settings = config.model.model_dump(include=model) | config.learner.model_dump()
    return settings | config.rollout.model_dump(include=rollout) | {"seed": config.run.seed}


def _table(settings: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | `{toml_value(value)}` |"
        for name, value in settings.items()
        if value is not None and value not in ("", ())
    ]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _made_by(start: Record) -> str:
    """Return a sentence on the code and the libraries, as far as the run has recorded them."""
    commit = start.get("commit")
    of = f", commit `{commit}`" if commit else ""
    versions: Mapping[str, str] = start.get("versions") or {}
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "grpo-actors")
    version = start.get("version", "of an unknown version")
    return f"Made by grpo-actors {version}{of}" + (f", with {libraries}." if libraries else ".")


def _start(run_dir: Path) -> Record:
    """Return the run's newest ``start`` record; empty if the run kept no records."""
    starts = [record for record in _records(run_dir) if record["topic"] == "start"]
    return starts[-1] if starts else {}


def _records(run_dir: Path) -> Iterator[Record]:
    reader = HistoryReader(run_dir)
    try:
        while (record := reader.read()) is not None:
            yield record
    finally:
        reader.close()
