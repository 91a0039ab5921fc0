"""The problems, and what a completion of one is worth: sections [data] and [reward]."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from grpo_actors.config.section import NotNegative, Positive, Section, Text

#: Task -> its class, as ``module:class`` of `grpo_actors.tasks`; imported only when the task is asked for.
TASKS: dict[str, str] = {
    "gsm8k": "gsm8k:Gsm8k",
    "arithmetic": "arithmetic:Arithmetic",
    "jsonl": "jsonl:Jsonl",
    "reasoning_gym": "reasoning_gym:ReasoningGym",
}

if TYPE_CHECKING:  # a type checker cannot know the keys of a table
    _Task = str
else:
    _Task = Literal[tuple(TASKS)]


class DataConfig(Section):
    """[data]: the problems."""

    task: _Task = Field("gsm8k", description="which problems, with their rewards")
    path: str = Field(
        "", description="training data: a .jsonl file, or a local copy of GSM8K; empty: the hub's"
    )
    eval_path: str = Field("", description="held-out data; empty: the task's own split, or a part of path")
    prompt_column: Text = Field("question", description="jsonl: column with the problem")
    answer_column: Text = Field("answer", description="jsonl: column with the true answer")
    gym_task: str = Field("", description="reasoning_gym: name of a task of that library, such as chain_sum")
    gym_settings: dict[str, Any] = Field(
        default_factory=dict, description="reasoning_gym: that task's own settings, such as { max_terms = 3 }"
    )
    gym_size: int = Field(
        2000, ge=1, le=2**20, description="reasoning_gym: training problems made; repeats are left out"
    )
    gym_eval_size: int = Field(200, ge=1, le=2**18, description="reasoning_gym: held-out problems made")
    system_prompt: str | None = Field(
        None, description='first message of every prompt; not set: the task\'s own; "": none'
    )
    num_shots: int = Field(
        0, ge=0, le=3, description="gsm8k: worked examples shown in the chat before each problem"
    )
    environment: str = Field(
        "",
        description='who replies to a turn of a completion: "calculator", "file.py:function" or "module:function"; '
        "empty: nobody, a completion is one turn",
    )
    max_train_samples: NotNegative = Field(0, description="training problems used; 0: all")
    max_prompt_length: Positive = Field(512, description="tokens; problems with a longer prompt are left out")
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="jsonl without eval_path: share of the problems held out"
    )
    shuffle: bool = Field(default=True, description="pose the problems in a random order, new in each epoch")


class RewardConfig(Section):
    """[reward]: what a completion is worth."""

    functions: dict[Text, float] = Field(
        default_factory=dict,
        description='weights by reward: a built-in name, "file.py:function" or "module:function"; empty: the task\'s own',
    )
    reward_timeout_s: float = Field(
        10.0,
        gt=0,
        description="seconds that a reward of your own, or of a library, may take for one group, an environment for one turn",
    )
    allow_code_execution: bool = Field(
        default=False,
        description="let code_tests run programs that the model wrote: read docs/tasks.md first",
    )
    code_timeout_s: float = Field(
        4.0, gt=0, le=60, description="code_tests: seconds, of the clock and of CPU time, for one program"
    )
    code_memory_gb: float = Field(
        1.0, gt=0, description="code_tests: address space of one program; macOS does not enforce it"
    )
