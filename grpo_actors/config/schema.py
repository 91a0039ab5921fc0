"""The settings of all sections: name, type, bounds, default and a one-line description.

Defaults exist only here and in `data`, `objective` and `thresholds`, which define their own sections. The model does
not know files or the command line (`load` does), and nothing here needs MLX or a socket. Types are strict: text is
never read as a number; a whole number is also a number. Contradictions between settings are in `rules`.
"""

import os.path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from grpo_actors.config.data import DataConfig, RewardConfig, SourceConfig, Sources
from grpo_actors.config.objective import ObjectiveConfig
from grpo_actors.config.rules import check, is_loopback
from grpo_actors.config.section import NotNegative, NotNegativeOrAuto, Numbers, Positive, Section, Text, Texts
from grpo_actors.config.thresholds import HealthConfig

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Trackers = Annotated[tuple[TrackerName, ...], Field(strict=False)]

#: Three consecutive ports are used, and 65535 is the last.
LAST_FIRST_PORT = 65533


class RunConfig(Section):
    """[run]: the run as a whole."""

    run_name: Text = Field("grpo", description="name of the run in logs and dashboards")
    # A shell leaves the ~ of --set output_dir=~/x alone, and a file has no shell.
    output_dir: Annotated[Text, AfterValidator(os.path.expanduser)] = Field(
        "outputs/grpo", description="the run folder: checkpoints, metrics, completions, socket addresses"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the data order, of every sample and of new weights"
    )
    resume: Literal["auto", "never", "must"] = Field(
        "auto",
        description="continue from the newest checkpoint of the run folder: if there is one (auto), never, or fail "
        "without one (must)",
    )
    save_steps: NotNegative = Field(100, description="updates between checkpoints; 0: only at the end")
    keep_checkpoints: Positive = Field(
        3, description="newest checkpoints to keep; the best one is always kept"
    )
    cuda_mps: bool = Field(
        default=True,
        description="on NVIDIA, start CUDA MPS for the run: its processes then share a GPU instead of taking turns",
    )


class ModelConfig(Section):
    """[model]: the policy, and the weights of it that are trained."""

    model_name: Text = Field(
        "tiny", description='"tiny" (ships with the package), a model folder, or a hub id'
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights; auto: float32 on CPU, elsewhere that of the model"
    )
    fine_tune_type: Literal["full", "lora", "dora"] = Field(
        "full", description="train all weights, or a LoRA or DoRA adapter on the frozen base"
    )
    base_bits: Literal[0, 4, 8] = Field(
        0, description="bits to which the frozen base of an adapter is quantised (QLoRA); 0: as stored"
    )
    lora_rank: int = Field(8, ge=1, description="rank of the adapter's matrices")
    lora_scale: float = Field(20.0, gt=0, description="factor on the adapter's output")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the adapter's inputs dropped in training"
    )
    lora_layers: int = Field(-1, ge=-1, description="layers with an adapter, counted from the last; -1: all")
    lora_keys: Texts = Field(
        (),
        description="modules of a layer with an adapter, such as self_attn.q_proj; empty: mlx-lm's default",
    )
    adapter_path: str = Field(
        "",
        description="adapter folder, mlx-lm's or PEFT's, to start from: trained on, or added to the weights by full training",
    )
    trust_remote_code: bool = Field(
        default=False, description="let a model or tokenizer folder run its own Python code"
    )


class RolloutConfig(Section):
    """[rollout]: the workers, and how they sample completions."""

    workers: NotNegativeOrAuto = Field(
        1,
        description="rollout processes; auto: as many as measurably help; 0: sample inside the learner's process",
    )
    rollout_devices: Numbers = Field(
        (),
        description="numbers of the GPUs of the workers, in turns; empty: those without a learner first, as memory allows",
    )
    num_generations: Positive = Field(8, description="completions of one problem, which form a group")
    max_new_tokens: Positive = Field(
        256,
        description="tokens, including those of an environment; a longer completion is cut and counts as truncated",
    )
    think_tokens: NotNegative = Field(
        0,
        description="tokens of thinking in one turn, after which the closing tag is inserted; it does not train; 0: no bound",
    )
    max_turns: Positive = Field(
        8, description="with data.environment: turns of the policy after which a completion ends"
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="divisor of the logits when sampling",
        json_schema_extra={"why": "greedy completions of one problem are all the same"},
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens with this total probability"
    )
    top_k: NotNegative = Field(0, description="sample from this many likeliest tokens; 0: off")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="drop tokens below this share of the likeliest token's probability"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="divisor of repeated tokens' logits; 1: off")
    stop: Texts = Field((), description="texts that end a completion, in addition to the model's end token")
    batch_groups: Positive = Field(1, description="groups that a worker samples in one batch")
    rollout_ranks: Positive = Field(
        1,
        description="processes among which a worker's model is divided; on CUDA each has a GPU of its own",
    )
    max_kv_tokens: NotNegative = Field(
        0,
        description="bound on a batch: completions at a time × (longest prompt + max_new_tokens); 0: no bound",
    )
    max_staleness: NotNegative = Field(
        1, description="updates by which a group's policy may lag behind; 0: strictly on-policy"
    )
    in_flight_updates: bool = Field(
        default=False,
        description="workers take new weights between two tokens, and new groups as rows become free",
    )
    quantize_for_rollouts: bool = Field(
        default=False, description="workers sample with quantised weights: less memory, a less exact policy"
    )
    rollout_bits: Literal[4, 8] = Field(4, description="bits of a weight with quantize_for_rollouts")
    kv_bits: Literal[0, 4, 8] = Field(
        0,
        description="bits of a cached key or value in workers: more completions at a time, a less exact policy; 0: as computed",
    )
    lease_timeout_s: float = Field(
        600.0, gt=0, description="seconds that a worker has for one group before another worker gets it"
    )

    @property
    def fewer_bits(self) -> bool:
        """Whether workers sample with fewer bits than the learner computes with."""
        return self.quantize_for_rollouts or self.kv_bits != 0

    @property
    def runs_held(self) -> int:
        """Return how many runs of `batch_groups` leases a worker holds at a time.

        Two: one is sampled and one waits, so that the worker never waits for a round trip. With in-flight updates
        there are no batches that end together; one run has rows, and two wait until rows become free. Where there are
        several workers, each holds one run less: what waits at one could begin at another.
        """
        return 3 if self.in_flight_updates else 2


class SelectionConfig(Section):
    """[selection]: which problems are posed, and which sampled groups train."""

    dynamic_sampling: bool = Field(
        default=False, description="replace groups whose completions all have the same reward (DAPO)"
    )
    min_success: float = Field(
        0.0, ge=0, le=1, description="replace groups with a smaller share of right completions"
    )
    max_success: float = Field(
        1.0, ge=0, le=1, description="replace groups with a larger share of right completions"
    )
    refill_limit: Positive = Field(
        10,
        description="groups that one update may replace, in multiples of its size; after that, all groups train",
    )
    oversampling: float = Field(
        1.0, ge=1, le=8, description="groups sampled ahead for an update, in multiples of its size"
    )
    curriculum: bool = Field(
        default=False,
        description="pose problems that are solved about half of the time more often than others",
    )
    curriculum_floor: float = Field(
        0.25, gt=0, le=1, description="lowest probability that a problem is posed in its turn"
    )

    @property
    def replaces_groups(self) -> bool:
        """Return whether any group can be passed over."""
        return self.dynamic_sampling or self.min_success > 0 or self.max_success < 1


class LearnerConfig(Section):
    """[learner]: the batch and the optimizer."""

    learner_devices: Numbers = Field(
        (), description="numbers of the GPUs of the learner's ranks, one each; empty: the first ones"
    )
    learning_rate: float = Field(1e-6, ge=0, description="learning rate at the peak of the schedule")
    num_epochs: Positive = Field(1, description="passes over the training problems")
    max_updates: NotNegative = Field(0, description="stop after this many updates; 0: after num_epochs")
    batch_size: Positive = Field(
        1,
        description="groups of the greatest lengths for which one micro-batch has room; it has to fit in memory",
    )
    gradient_accumulation_steps: Positive = Field(4, description="micro-batches in one update")
    num_iterations: Positive = Field(1, description="optimizer steps on the same groups")
    optimizer: Literal["adamw", "adam", "muon", "lion", "adafactor"] = Field(
        "adamw",
        description="optimizer of MLX; muon updates matrices, and adamw then updates embeddings and vectors",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warm-up: falls to 0 (cosine, linear), or constant"
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="share of all updates in which the learning rate rises to its peak"
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="larger gradients are scaled down to this norm; 0: off"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradients' running mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the squared gradients' running mean")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decoupled decay of matrices, in multiples of the learning rate; norms and biases have none",
    )
    ranks: Positive = Field(
        1,
        description="processes that share the micro-batches of each update; on CUDA each has a GPU of its own",
    )
    divide_model: bool = Field(
        default=False,
        description="ranks divide the frozen weights below an adapter among them, in place of micro-batches: for a model "
        "larger than one GPU",
    )
    divide_gradient: bool = Field(
        default=False,
        description="each rank keeps the gradient of its own part only, added up after each micro-batch: less memory, more "
        "traffic between ranks",
    )
    use_compile: bool = Field(
        default=True,
        description="compile the training step on a GPU, and the decoding step on CUDA; off: slower, easier to debug",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, slower"
    )
    skip_zero_advantage: bool = Field(
        default=True,
        description="if there is no KL or entropy term and top_entropy_share = 1, do not compute completions of "
        "advantage 0, which have no gradient; off: they count in entropy, clip_share and similar metrics",
    )

    @property
    def model_ranks(self) -> int:
        """Return the number of ranks among which the model is divided."""
        return self.ranks if self.divide_model else 1


class EvaluatorConfig(Section):
    """[evaluator]: how checkpoints are scored on held-out problems."""

    eval_every_updates: NotNegative = Field(25, description="updates between evaluations; 0: off")
    evaluator_device: NotNegativeOrAuto = Field(
        "auto", description="number of the GPU of the evaluator; auto: where most memory is left"
    )
    eval_subset_size: NotNegative = Field(200, description="held-out problems scored; 0: all")
    eval_max_new_tokens: NotNegative = Field(0, description="tokens of an answer; 0: max_new_tokens")
    eval_batch_size: Positive = Field(32, description="answers sampled at a time")
    eval_temperature: float = Field(1.0, gt=0, description="temperature of the sampled answers")
    eval_sampled: bool = Field(
        default=False,
        description="also sample an answer to each problem, and let these answers decide which checkpoint is best",
    )
    eval_sources: Sources = Field(
        (),
        description="a table [[evaluator.eval_sources]] with a name for each data set to score on, in place of a held-out "
        "part of the training data",
    )
    metric: Text | None = Field(
        None,
        description='what decides which checkpoint is best: "reward" (the weighted sum), "accuracy" or the name of one '
        'reward; not set: "reward" if a reward other than the built-in ones and the task\'s own counts, else "accuracy"',
    )


class TransportConfig(Section):
    """[transport]: how the processes reach each other."""

    scheme: Literal["ipc", "tcp"] = Field(
        "ipc", description="sockets in the file system (ipc), or TCP for other hosts (tcp)"
    )
    host: Text = Field("127.0.0.1", description="tcp: address to listen on")
    port: int = Field(
        0, ge=0, le=LAST_FIRST_PORT, description="tcp: first of three consecutive ports; 0: free ones"
    )
    keys_dir: Text = Field(
        "~/.config/grpo_actors/keys",
        description="tcp: folder of the learner's key and of the list of keys that it lets in (grpo_actors.keys)",
    )
    insecure: bool = Field(
        default=False,
        description="tcp: no keys: nothing is encrypted, and everyone who reaches the port may join",
    )
    events_text: bool = Field(
        default=False,
        description="tcp beyond this host: also send texts (prompts, completions, logs) to readers of the events",
    )

    @property
    def uses_keys(self) -> bool:
        """Return whether a peer needs a key to connect."""
        return self.scheme == "tcp" and not self.insecure

    @property
    def is_local(self) -> bool:
        """Return whether only this host can reach the sockets."""
        return self.scheme == "ipc" or is_loopback(self.host)

    @property
    def warning(self) -> str | None:
        """Return the line to show at every start; None if the sockets are protected."""
        if self.scheme == "ipc" or not self.insecure:
            return None
        return (
            f"transport.insecure = true: whoever reaches {self.host} can join this run, read its weights and send it "
            "samples; nothing is encrypted"
        )


class MetricsConfig(Section):
    """[metrics]: what is logged, and where."""

    logging_steps: Positive = Field(1, description="updates between two lines of metrics on the terminal")
    log_jsonl: bool = Field(
        default=True, description="write metrics.jsonl and completions.jsonl to the run folder"
    )
    record_groups: bool = Field(
        default=False, description="write every group that trains to groups.jsonl, for learner --replay"
    )
    write_report: bool = Field(
        default=True, description="write report.html at the end of a run, if the extra page is installed"
    )
    log_completions: NotNegative = Field(
        1, description="groups of an update whose completions are written; 0: none"
    )
    trackers: Trackers = Field(
        (), description="trackers that get the run's curves; each needs the extra of its name"
    )


class Config(Section):
    """All settings of a run, validated and resolved."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    selection: SelectionConfig = SelectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    transport: TransportConfig = TransportConfig()
    metrics: MetricsConfig = MetricsConfig()
    health: HealthConfig = HealthConfig()

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return the sources of training and of evaluation; empty without a mixture."""
        return (*self.data.sources, *self.evaluator.eval_sources)

    @property
    def environments(self) -> dict[str, str]:
        """Return source -> its environment, for all that have one; "" stands for problems that come from no source."""
        named = {source.name: self.data.of(source).environment for source in self.all_sources}
        given = named if self.data.sources else {"": self.data.environment, **named}
        return {name: environment for name, environment in given.items() if environment}

    @property
    def rewards_of_sources(self) -> dict[str, tuple[str, ...]]:
        """Return source -> the rewards that score its problems, for all sources that not every reward scores."""
        return {source.name: source.rewards for source in self.all_sources if source.rewards}

    def saves_after(self, update: int) -> bool:
        """Return whether a checkpoint is due after `update`: at multiples of save_steps, and of eval_every_updates, for a score."""
        periods = (self.run.save_steps, self.evaluator.eval_every_updates)
        return any(period and update % period == 0 for period in periods)

    @property
    def groups_per_update(self) -> int:
        """Return the number of groups that one update consumes: batch_size × gradient_accumulation_steps."""
        return self.learner.batch_size * self.learner.gradient_accumulation_steps

    @property
    def micro_batch_tokens(self) -> int:
        """Return the tokens of a micro-batch, prompts included: `batch_size` groups at their longest."""
        group = self.rollout.num_generations * self.rollout.max_new_tokens + self.data.max_prompt_length
        return self.learner.batch_size * group

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        check(self)
        return self


#: Section name -> its model, in the order in which they are shown.
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

#: Leaf name -> its section. Leaf names are unique, so a bare key is enough.
OWNER: dict[str, str] = {leaf: name for name, section in SECTIONS.items() for leaf in section.model_fields}
