"""Sections [data] and [reward]: the problems, and the rewards of their completions."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from grpo_actors.config.section import NotNegative, Positive, Section, Text

#: Task -> its class, as ``module:class`` of `grpo_actors.tasks`; imported only when the task is used.
TASKS: dict[str, str] = {
    "gsm8k": "gsm8k:Gsm8k",
    "arithmetic": "arithmetic:Arithmetic",
    "jsonl": "jsonl:Jsonl",
    "reasoning_gym": "reasoning_gym:ReasoningGym",
}

if TYPE_CHECKING:  # a type checker cannot read the keys of a table
    _Task = str
else:
    _Task = Literal[tuple(TASKS)]


#: The text that is judged: what follows the thinking, or all.
Grade = Literal["after_think", "all"]


class DataConfig(Section):
    """[data]: the problems."""

    task: _Task = Field("gsm8k", description="the problems, with their default rewards")
    path: str = Field(
        "", description="training data: a .jsonl file, or a local copy of GSM8K; empty: from the hub"
    )
    eval_path: str = Field("", description="held-out data; empty: the task's own split, or a part of path")
    prompt_column: Text = Field("question", description="jsonl: column with the problem")
    answer_column: Text = Field("answer", description="jsonl: column with the true answer")
    mathematics: bool = Field(
        default=False,
        description="jsonl: whether the answers are mathematics: \\boxed{42}, **42** and 42 km then count as 42 too",
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
        0.1, gt=0, lt=1, description="jsonl without eval_path: share of the problems held out"
    )
    shuffle: bool = Field(
        default=True, description="pose the problems in a random order, a new one each epoch"
    )


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
        description="let code_tests run programs that the model wrote: read docs/tasks.md first",
    )
    code_timeout_s: float = Field(
        4.0, gt=0, le=60, description="code_tests: seconds of wall time and of CPU time for one program"
    )
    code_memory_gb: float = Field(
        1.0, gt=0, description="code_tests: address space of one program; macOS does not enforce it"
    )
