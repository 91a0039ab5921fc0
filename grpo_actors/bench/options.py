"""The options of the command line, and the run settings that follow from them. Does not load MLX."""

from dataclasses import dataclass

from grpo_actors.bench.workload import EQUAL, Shape
from grpo_actors.config import Config, load_config
from grpo_actors.config.names import leaf_of
from grpo_actors.errors import ConfigError

#: Tokens of a prompt if the option is not given.
PROMPT_TOKENS = 64
#: Option -> its least value. A completion has at least two tokens: with one there is no decoding step.
LEAST = {
    "prompt_tokens": 1,
    "tokens": 2,
    "groups": 1,
    "generations": 2,
    "rounds": 1,
    "places": 1,
    "processes": 1,
    "fetchers": 1,
    "workers": 1,
    "warmup": 0,
}


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line; None means that a count was not given."""

    part: str
    model: str = "tiny"
    #: Name in `known_models`, instead of `model`.
    random: str | None = None
    #: Folder to keep a random model in.
    keep: str | None = None
    dtype: str = "auto"
    prompt_tokens: int | None = None
    #: Tokens of a completion.
    tokens: int = 64
    groups: int = 8
    #: Completions of a group.
    generations: int = 8
    #: Measured rounds.
    rounds: int = 5
    #: KEY=VALUE, in launch.py's form.
    overrides: tuple[str, ...] = ()
    json: bool = False
    #: Distribution of the completions' lengths.
    lengths: str = EQUAL
    against: str | None = None
    #: Completions decoded at the same time; None means all.
    places: int | None = None
    processes: int = 1
    fetchers: int = 1
    chunks: bool = False
    #: Simulated ones.
    workers: int = 256
    #: Updates before the measured ones.
    warmup: int = 2

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            count = getattr(self, name)
            if count is not None and count < least:
                raise ConfigError(f"--{name.replace('_', '-')}: must be at least {least}, got {count}")


def config_of(options: Options, model_name: str, *settings: str) -> Config:
    """Return the settings of a run of the size in `options`.

    Args:
        options: The command line's options.
        model_name: Value of model.model_name.
        settings: KEY=VALUE of the part; the user's own settings come after them and override them.

    Raises:
        ConfigError: a setting is unusable, or an update would not have ``--groups`` groups.
    """
    base = [
        f"model_name={model_name}",
        f"dtype={options.dtype}",
        f"num_generations={options.generations}",
        f"max_new_tokens={options.tokens}",
        f"max_prompt_length={max(512, options.prompt_tokens or 0)}",
        f"batch_size={options.groups}",
        f"batch_groups={options.groups}",
        "task=arithmetic",
        *settings,
    ]
    rows = _batch_size(options)
    if options.groups % rows:
        raise ConfigError(f"--set: batch_size must divide --groups = {options.groups}, got {rows}")
    base.append(f"gradient_accumulation_steps={options.groups // rows}")
    config = load_config(None, [*base, *options.overrides]).config
    if config.groups_per_update != options.groups:
        raise ConfigError(
            f"--set: batch_size × gradient_accumulation_steps must be --groups = {options.groups}, "
            f"got {config.groups_per_update}; leave gradient_accumulation_steps out"
        )
    return config


def shape_of(options: Options, config: Config) -> Shape:
    """Return the size of the batch; values that the user set with ``--set`` take precedence."""
    return Shape(
        options.groups,
        config.rollout.num_generations,
        options.prompt_tokens or PROMPT_TOKENS,
        config.rollout.max_new_tokens,
        options.lengths,
        options.places,
    )


def _batch_size(options: Options) -> int:
    """Return the groups in a micro-batch: the user's setting, or all groups."""
    own = [text for text in options.overrides if leaf_of(text.partition("=")[0], "--set") == "batch_size"]
    return load_config(None, [f"batch_size={options.groups}", *own]).config.learner.batch_size
