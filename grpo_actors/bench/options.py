"""What the command line asks for, and the settings of a run that follow from it. Loads no MLX."""

from dataclasses import dataclass

from grpo_actors.bench.workload import Shape
from grpo_actors.config import Config, load_config
from grpo_actors.config.names import leaf_of
from grpo_actors.errors import ConfigError

#: Tokens of a prompt, where nothing else is asked for.
PROMPT_TOKENS = 64
#: Counts that the command line takes -> the least that makes sense. One token has no step of decoding.
LEAST = {
    "prompt_tokens": 1,
    "tokens": 2,
    "groups": 1,
    "generations": 2,
    "rounds": 1,
    "places": 1,
    "processes": 1,
    "fetchers": 1,
    "warmup": 0,
}


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; a count that is None was not given."""

    part: str
    model: str = "tiny"
    #: A name in `known_models`, instead of `model`.
    random: str | None = None
    #: Where the folder of a random model stays.
    keep: str | None = None
    dtype: str = "auto"
    prompt_tokens: int | None = None
    #: Of a completion.
    tokens: int = 64
    groups: int = 8
    #: Completions of a group.
    generations: int = 8
    #: That count.
    rounds: int = 5
    #: KEY=VALUE, as launch.py takes them.
    overrides: tuple[str, ...] = ()
    json: bool = False
    ragged: bool = False
    against: str | None = None
    #: Completions side by side; None: all.
    places: int | None = None
    processes: int = 1
    fetchers: int = 1
    chunks: bool = False
    #: Updates that do not count.
    warmup: int = 2

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            count = getattr(self, name)
            if count is not None and count < least:
                raise ConfigError(f"--{name.replace('_', '-')}: must be at least {least}, got {count}")


def config_of(options: Options, model_name: str, *settings: str) -> Config:
    """The settings of a run of the size that is asked for.

    Args:
        options: The command line.
        model_name: As model.model_name.
        settings: KEY=VALUE of the part; the user's own come after them.

    Raises:
        ConfigError: a setting is unusable, or an update would not have the groups that are asked for.
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
    """The batch that is asked for; what is set by hand of the settings wins."""
    return Shape(
        options.groups,
        config.rollout.num_generations,
        options.prompt_tokens or PROMPT_TOKENS,
        config.rollout.max_new_tokens,
        options.ragged,
        options.places,
    )


def _batch_size(options: Options) -> int:
    """Groups in a micro-batch: the user's, or all."""
    own = [text for text in options.overrides if leaf_of(text.partition("=")[0], "--set") == "batch_size"]
    return load_config(None, [f"batch_size={options.groups}", *own]).config.learner.batch_size
