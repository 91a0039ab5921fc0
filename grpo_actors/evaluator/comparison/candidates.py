"""Find and load the candidates: the policies behind the folders, runs and hub ids that a user names.

`rundir.naming` decides what a folder is. This module does not depend on how the policies are evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_actors import consent
from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import Policy, load_base, load_policy
from grpo_actors.rundir.checkpoint_weights import check_adapter, is_adapter, load_weights, load_whole
from grpo_actors.rundir.checkpoints import best, checkpoint_at, verify
from grpo_actors.rundir.folder import BASE, CONFIG_FILE
from grpo_actors.rundir.naming import checkpoints_of, open_policy


@dataclass(frozen=True, slots=True)
class Candidate:
    """One policy to evaluate."""

    #: The name shown to the user: path, hub id, or ``RUN/base``.
    name: str
    #: Its folder; None for a hub id, "tiny", or the base model of a run.
    folder: Path | None = None
    #: Number of updates that its run had done; None if it belongs to no run.
    update: int | None = None
    #: The folder of its run; None if it belongs to no run.
    run: Path | None = None

    @property
    def key(self) -> Path | str:
        """Identity of the policy, equal for two names of the same folder."""
        return self.name if self.folder is None else self.folder.resolve()

    @property
    def has_settings(self) -> bool:
        """Whether its run has a settings file."""
        return _config_file(self) is not None

    @property
    def is_base(self) -> bool:
        """Whether it is the base model of its run."""
        return self.run is not None and self.folder is None


def find_candidates(names: Sequence[str]) -> list[Candidate]:
    """Return the policies that the names stand for, each once. A run folder stands for its base and all checkpoints.

    Raises:
        ModelError: A name stands for nothing usable, or a checkpoint is damaged.
    """
    found: dict[Path | str, Candidate] = {}
    for name in names:
        for candidate in _candidates_of(name):
            found.setdefault(candidate.key, candidate)
    return list(found.values())


def pick(name: str, candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that `name` means; None if there is none.

    `name` is a full name, the last part of one, or ``best`` if all checkpoints belong to one run.

    Raises:
        ConfigError: Several candidates have that name.
    """
    runs = {candidate.run for candidate in candidates if candidate.run is not None}
    if name == "best" and len(runs) == 1:
        marked = best(runs.pop())
        name = marked.checkpoint if marked else name
    exact = [candidate for candidate in candidates if name == candidate.name]
    meant = exact or [candidate for candidate in candidates if Path(candidate.name).name == name]
    if len(meant) > 1:
        raise ConfigError(
            f"--compare: {name} is {' and '.join(c.name for c in meant)}; write the one you mean"
        )
    return meant[0] if meant else None


def settings_of(
    candidates: Sequence[Candidate],
    file: str | None,
    overrides: Sequence[str],
    *,
    allowed: Sequence[str] = (),
    only_loads: bool = False,
) -> Config:
    """Load the settings of the evaluation: from `file`, else from the first candidate's run that has some, else defaults.

    Args:
        candidates: The candidates.
        file: The file given with ``--config``.
        overrides: Settings as ``key=value``.
        allowed: Names of the code that a run's settings may run (`consent`).
        only_loads: Whether the settings only load a model, and score nothing.

    Raises:
        ConfigError: A file, a name or a value is unusable, or a run's settings name code that is not `allowed`.
    """
    runs = (_config_file(candidate) for candidate in candidates)
    of_run = None if file else next(filter(None, runs), None)
    config = load_config(file or of_run, overrides).config
    if of_run is not None:
        code = consent.code_of_model(config.model) if only_loads else consent.code_of(config)
        consent.check(code, [*allowed, *consent.named_by_user(code, overrides)], of_run)
    return config


def load_candidate(candidate: Candidate, config: Config) -> Policy:
    """Load the policy of a candidate, with the chat template of the settings.

    A run's base, and an adapter on its base, are loaded as the settings describe. Any other model is loaded unchanged.

    Raises:
        ModelError: The candidate has no usable model.
        ConfigError: It has an adapter of another kind or base than the settings.
    """
    policy = _load(candidate, config)
    # A run's whole checkpoint has the run's template as its own, perhaps no longer under the name in the settings.
    is_whole = candidate.has_settings and not policy.has_adapter and not candidate.is_base
    if config.data.chat_template and not is_whole:
        policy.chat.use(config.data.chat_template)
    return policy


def _load(candidate: Candidate, config: Config) -> Policy:
    if candidate.is_base:
        # A new adapter would change nothing.
        starts = bool(config.model.adapter_path)
        return load_policy(config.model, seed=config.run.seed) if starts else load_base(config.model)
    if candidate.folder is not None and is_adapter(candidate.folder):
        if not candidate.has_settings:
            return open_policy(str(candidate.folder))
        check_adapter(candidate.folder, config.model)
        # What it started from need not exist any more.
        policy = load_policy(config.model.model_copy(update={"adapter_path": ""}), seed=config.run.seed)
        load_weights(candidate.folder, policy)
        return policy
    # A complete model: its base and the kind of its training do not matter.
    if candidate.folder is not None:
        return load_whole(candidate.folder, config.model)
    plain = {"model_name": candidate.name, "fine_tune_type": "full", "base_bits": 0, "adapter_path": ""}
    return load_base(config.model.model_copy(update=plain))


def _candidates_of(name: str) -> Iterator[Candidate]:
    path = Path(name).expanduser()
    checkpoints = checkpoints_of(path)
    if checkpoints:
        yield Candidate(str(path / BASE), update=0, run=path)
        for checkpoint in checkpoints:
            yield _folder(checkpoint.path)
    elif is_adapter(path):
        yield _folder(path)
    else:
        locate(name)  # raises if it is no model
        yield _folder(path) if path.is_dir() else Candidate(name)


def _folder(path: Path) -> Candidate:
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        return Candidate(str(path), path)
    fault = verify(checkpoint)
    if fault is not None:
        raise ModelError(f"{fault}; leave this checkpoint out")
    return Candidate(str(path), path, checkpoint.update, path.parent)


def _config_file(candidate: Candidate) -> Path | None:
    """Return the settings file of its run; None if there is none."""
    file = candidate.run / CONFIG_FILE if candidate.run is not None else None
    return file if file is not None and file.is_file() else None
