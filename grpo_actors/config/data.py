"""Sections [data] and [reward]: the problems, and the rewards of their completions."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from grpo_actors.config.section import NotNegative, Positive, Section, Text, Texts

#: Task -> its class, as ``module:class`` of `grpo_actors.tasks`; imported only when the task is used.
TASKS: dict[str, str] = {
    "gsm8k": "gsm8k:Gsm8k",
    "arithmetic": "arithmetic:Arithmetic",
    "dataset": "dataset:DataSet",
    "reasoning_gym": "reasoning_gym:ReasoningGym",
}

#: Former names of tasks.
OLDER_TASKS = {"jsonl": "dataset"}

if TYPE_CHECKING:  # a type checker cannot read the keys of a table
    _Task = str
else:
    _Task = Annotated[
        Literal[tuple(TASKS)],
        BeforeValidator(lambda name: OLDER_TASKS.get(name, name) if isinstance(name, str) else name),
    ]


class SourceConfig(Section):
    """A table of [[data.sources]] or [[evaluator.eval_sources]]. A setting that it leaves out is that of [data]."""

    name: Annotated[str, Field(pattern="^[^/]+$", max_length=100)] = Field(
        description="name of the source in metrics and scores, and the beginning of its problems' ids"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="its share of the groups, relative to the others; not set: its number of problems",
    )
    rewards: Texts = Field((), description="names of reward.functions that score its problems; empty: all")
    task: _Task | None = None
    path: str | None = None
    eval_path: str | None = None
    subset: str | None = None
    split: Text | None = None
    eval_split: str | None = None
    revision: str | None = None
    prompt_column: Text | None = None
    answer_column: Text | None = None
    gym_task: str | None = None
    gym_settings: dict[str, Any] | None = None
    gym_size: int | None = Field(None, ge=1, le=2**20)
    gym_eval_size: int | None = Field(None, ge=1, le=2**18)
    mathematics: bool | None = None
    system_prompt: str | None = None
    num_shots: int | None = Field(None, ge=0, le=3)
    environment: str | None = None
    max_train_samples: NotNegative | None = None
    eval_fraction: float | None = Field(None, gt=0, lt=1)


#: Settings of a source that [data] does not have.
_OF_SOURCES = frozenset({"name", "weight", "rewards"})
#: Settings of [data] that say where the problems of its task are.
_PLACES = ("path", "eval_path", "subset", "eval_split", "revision")
Sources = Annotated[tuple[SourceConfig, ...], Field(strict=False)]


#: The text that is judged: what follows the thinking, or all.
Grade = Literal["after_think", "all"]


class DataConfig(Section):
    """[data]: the problems."""

    task: _Task = Field("gsm8k", description="the problems, with their default rewards")
    path: str = Field(
        "",
        description='dataset: a file, a glob or a folder of JSON, CSV or Parquet, "file.py:function" or a hub id; '
        "gsm8k: a local copy, empty: from the hub",
    )
    eval_path: str = Field(
        "", description="held-out data, as path; empty: eval_split, the task's own, or a part of path"
    )
    subset: str = Field(
        "", description="dataset: configuration of a data set of the hub; empty: its only one"
    )
    split: Text = Field("train", description="dataset: the split to train on, where path has several")
    eval_split: str = Field("", description="dataset: the split that is held out; empty: as eval_path says")
    revision: str = Field("", description="dataset: branch, tag or commit on the hub; empty: the newest")
    prompt_column: Text = Field("question", description="dataset: column with the problem, a text or a chat")
    answer_column: Text = Field("answer", description="dataset: column with the true answer, of any type")
    mathematics: bool = Field(
        default=False,
        description="dataset: whether the answers are mathematics: \\boxed{42}, **42** and 42 km then count as 42 too",
    )
    gym_task: str = Field("", description="reasoning_gym: name of a task of that library, such as chain_sum")
    gym_settings: dict[str, Any] = Field(
        default_factory=dict, description="reasoning_gym: settings of that task, such as { max_terms = 3 }"
    )
    gym_size: int = Field(
        2000, ge=1, le=2**20, description="reasoning_gym: training problems to make; repeats are left out"
    )
    gym_eval_size: int = Field(200, ge=1, le=2**18, description="reasoning_gym: held-out problems to make")
    system_prompt: str | None = Field(
        None, description='first message of every prompt; not set: that of the task; "": none'
    )
    chat_template: str = Field(
        "",
        description="chat template of the prompts: a Jinja file, its text, or the name of one of the model's templates; "
        "empty: the model's default",
    )
    chat_template_kwargs: dict[Text, Any] = Field(
        default_factory=dict,
        description="variables of the model's chat template, such as { enable_thinking = true }; the others have the "
        "template's own defaults",
    )
    num_shots: int = Field(
        0, ge=0, le=3, description="gsm8k: worked examples shown in the chat before each problem"
    )
    environment: str = Field(
        "",
        description='replies to each turn of a completion: "calculator", "file.py:function" or "module:function"; '
        "empty: no replies, a completion is one turn",
    )
    max_train_samples: NotNegative = Field(0, description="training problems used; 0: all")
    max_prompt_length: Positive = Field(512, description="tokens; problems with a longer prompt are left out")
    eval_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="dataset without eval_path and eval_split: share of the problems held out",
    )
    shuffle: bool = Field(
        default=True, description="pose the problems in a random order, a new one each epoch"
    )

    sources: Sources = Field(
        (),
        description="a mixture: a table [[data.sources]] with a name for each data set; empty: one, as above",
    )

    @property
    def title(self) -> str:
        """Return what the problems are, in words."""
        return (
            f"a mixture of {', '.join(source.name for source in self.sources)}" if self.sources else self.task
        )

    def of(self, source: SourceConfig) -> "DataConfig":
        """Return the settings of one source."""
        given = {name: value for name, value in source if value is not None and name not in _OF_SOURCES}
        # Where another task's problems are says nothing of this one's.
        elsewhere = dict.fromkeys(_PLACES, "") if source.task not in (None, self.task) else {}
        return self.model_copy(update={**elsewhere, **given, "sources": ()})


class RewardConfig(Section):
    """[reward]: the rewards of a completion."""

    functions: dict[Text, float] = Field(
        default_factory=dict,
        description='weight of each reward: a built-in name, "file.py:function" or "module:function"; '
        "empty: the rewards of the task",
    )
    grade: Grade = Field(
        "after_think",
        description="text that rewards and accuracy judge: after the last closing tag of thinking (</think>), none if "
        "thinking never ends; or all",
    )
    reward_timeout_s: float = Field(
        10.0,
        gt=0,
        description="seconds that an own or library reward may take for one group, or an own environment for one turn",
    )
    allow_code_execution: bool = Field(
        default=False,
        description="let code_tests run programs that the model wrote: read docs/howto/code-tests.md first",
    )
    code_timeout_s: float = Field(
        4.0, gt=0, le=60, description="code_tests: seconds of wall time and of CPU time for one program"
    )
    code_memory_gb: float = Field(
        1.0, gt=0, description="code_tests: address space of one program; macOS does not enforce it"
    )
