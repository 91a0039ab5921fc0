"""What is compared: the folders, runs and hub ids that a user names, and how each is loaded.

Knows which policies a run has; what a folder is, `folders` decides. Refuses to know what is asked of the policies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import Policy, load_base, load_policy
from grpo_actors.rundir.checkpoint_weights import check_adapter, is_adapter, load_weights
from grpo_actors.rundir.checkpoints import best, checkpoint_at, verify
from grpo_actors.rundir.folder import CONFIG_FILE
from grpo_actors.rundir.naming import checkpoints_of, open_policy

#: Ends the name of the model that a run began with.
BASE = "base"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One policy to examine."""

    #: As it is shown: its path or hub id; ``RUN/base``.
    name: str
    #: Its folder; None: a hub id, "tiny", or the base model of a run.
    folder: Path | None = None
    #: Updates behind it, of its run; None: it belongs to no run.
    update: int | None = None
    #: The folder of its run.
    run: Path | None = None

    @property
    def key(self) -> Path | str:
        """The same for two ways to name one policy."""
        return self.name if self.folder is None else self.folder.resolve()

    @property
    def has_settings(self) -> bool:
        """Whether its run's settings are there."""
        return _config_file(self) is not None

    @property
    def is_base(self) -> bool:
        """Whether it is what its run began with."""
        return self.run is not None and self.folder is None


def find_candidates(names: Sequence[str]) -> list[Candidate]:
    """The policies that the names stand for, each once; a run's folder stands for its base model and all checkpoints.

    Raises:
        ModelError: there is nothing usable under a name, or a checkpoint is damaged.
    """
    found: dict[Path | str, Candidate] = {}
    for name in names:
        for candidate in _named(name):
            found.setdefault(candidate.key, candidate)
    return list(found.values())


def pick(name: str, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate that `name` means: its full name, the end of one, or ``best`` of the only run; None: no such one.

    Raises:
        ConfigError: several have that name.
    """
    runs = {candidate.run for candidate in candidates if candidate.run is not None}
    if name == "best" and len(runs) == 1:
        marked = best(runs.pop())
        name = str(marked["checkpoint"]) if marked else name
    exact = [candidate for candidate in candidates if name == candidate.name]
    meant = exact or [candidate for candidate in candidates if Path(candidate.name).name == name]
    if len(meant) > 1:
        raise ConfigError(
            f"--compare: {name} is {' and '.join(s.name for s in meant)}; write the one you mean"
        )
    return meant[0] if meant else None


def settings_of(candidates: Sequence[Candidate], file: str | None, overrides: Sequence[str]) -> Config:
    """What all are asked, and how: by the file given, else by the first run among them, else by the defaults.

    Raises:
        ConfigError: a file, a name or a value is unusable.
    """
    runs = (_config_file(candidate) for candidate in candidates)
    return load_config(file or next(filter(None, runs), None), overrides).config


def load_candidate(candidate: Candidate, config: Config) -> Policy:
    """Its policy: a model as it is; a run's base, or an adapter on its base, as the settings describe that.

    Raises:
        ModelError: there is nothing usable in it.
        ConfigError: it holds an adapter of another kind or base than that of the settings.
    """
    if candidate.is_base:
        return load_base(config.model)
    if candidate.folder is not None and is_adapter(candidate.folder):
        if not candidate.has_settings:
            return open_policy(str(candidate.folder))
        check_adapter(candidate.folder, config.model)
        policy = load_policy(config.model, seed=config.run.seed)
        load_weights(candidate.folder, policy)
        return policy
    # As it is: what it was trained from, and how, is no matter.
    location = candidate.name if candidate.folder is None else str(candidate.folder.resolve())
    plain = {"model_name": location, "fine_tune_type": "full", "base_bits": 0}
    return load_base(config.model.model_copy(update=plain))


def _named(name: str) -> Iterator[Candidate]:
    path = Path(name).expanduser()
    checkpoints = checkpoints_of(path)
    if checkpoints:
        yield Candidate(str(path / BASE), update=0, run=path)
        for checkpoint in checkpoints:
            yield _folder(checkpoint.path)
    elif is_adapter(path):
        yield _folder(path)
    else:
        locate(name)  # refuses what is no model
        yield _folder(path) if path.is_dir() else Candidate(name)


def _folder(path: Path) -> Candidate:
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        return Candidate(str(path), path)
    complaint = verify(checkpoint)
    if complaint is not None:
        raise ModelError(f"{complaint}; leave this checkpoint out")
    return Candidate(str(path), path, checkpoint.update, path.parent)


def _config_file(candidate: Candidate) -> Path | None:
    """The settings of its run, where there are any."""
    file = candidate.run / CONFIG_FILE if candidate.run is not None else None
    return file if file is not None and file.is_file() else None
