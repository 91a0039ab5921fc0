import pytest

from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["num_generations=1"],
            "rollout.num_generations must be at least 2 (a group of one has no baseline), got 1",
        ),
        # 3 × 2 = 6 groups: divisors 1, 2, 3, 6
        (
            ["batch_size=3", "gradient_accumulation_steps=2", "batch_groups=4"],
            (
                "rollout.batch_groups must divide the 6 groups of an update (batch_size × gradient_accumulation_steps), "
                "so one of 1, 2, 3, 6, got 4"
            ),
        ),
        (
            ["workers=0", "quantize_for_rollouts=true"],
            (
                "rollout.quantize_for_rollouts needs rollout.workers of at least 1 "
                "(with 0 the learner samples with the weights it trains), got true"
            ),
        ),
        (
            ["rollout_ranks=2", "workers=0"],
            "rollout.rollout_ranks must be 1 when workers is 0 (the learner samples with its own model, which is whole), got 2",
        ),
        (
            ["rollout_ranks=2", "quantize_for_rollouts=true"],
            (
                "rollout.rollout_ranks must be 1 with quantize_for_rollouts (parts of a model cannot be quantised; "
                "model.base_bits = 4 can), got 2"
            ),
        ),
        (
            ["rollout_ranks=2", "fine_tune_type=dora"],
            (
                'rollout.rollout_ranks must be 1 when fine_tune_type is "dora" (a norm of DoRA needs whole rows; "lora" '
                "does not), got 2"
            ),
        ),
        (
            ["rollout_ranks=2", "rollout_devices=[1, 2, 3]"],
            "rollout.rollout_devices must name rollout_ranks = 2 devices for each worker, got [1, 2, 3]",
        ),
        (
            ["divide_model=true"],
            'learner.divide_model needs fine_tune_type = "lora" (only frozen weights are divided), got true',
        ),
        (
            ["divide_model=true", "divide_gradient=true"],
            "learner.divide_model needs divide_gradient = false (an adapter's gradient is small), got true",
        ),
        (
            ["divide_model=true", "fine_tune_type=lora", "lora_dropout=0.1"],
            "learner.divide_model needs lora_dropout = 0 (each rank would drop other inputs), got true",
        ),
        (
            ["divide_model=true", "fine_tune_type=lora", "workers=0"],
            (
                "learner.divide_model needs rollout.workers of at least 1 (with 0 the learner's first rank would sample "
                "without the others), got true"
            ),
        ),
        (
            ["lora_layers=0"],
            "model.lora_layers must be -1 (all layers) or at least 1 (an adapter on none learns nothing), got 0",
        ),
        (
            ["task=dataset"],
            'data.path must name a file, folder, function or hub id when task is "dataset", got ""',
        ),
        (
            ["task=arithmetic", "path=x.jsonl"],
            (
                'data.path must be empty when task is "arithmetic", which makes its own problems '
                '(task = "dataset" reads a file), got "x.jsonl"'
            ),
        ),
        (
            ["task=reasoning_gym"],
            'data.gym_task must name one of the library\'s tasks, such as chain_sum, when task is "reasoning_gym", got ""',
        ),
        (
            ["functions={reasoning_gym=1}"],
            (
                'reward.functions must not have reasoning_gym when task is "gsm8k", whose problems that library '
                'cannot score, got { "reasoning_gym" = 1.0 }'
            ),
        ),
        (
            ["functions={code_tests=1}"],
            (
                "reward.functions must not have code_tests, which runs code that the model wrote, unless "
                "reward.allow_code_execution = true (docs/howto/code-tests.md says what that does not protect from), "
                'got { "code_tests" = 1.0 }'
            ),
        ),
        (
            ["fine_tune_type=full", "base_bits=4"],
            (
                'model.base_bits must be 0 when fine_tune_type is "full" (quantised weights cannot be trained; '
                '"lora" trains beside them), got 4'
            ),
        ),
        (
            ["optimizer=adam", "weight_decay=0.1"],
            (
                'learner.weight_decay must be 0 when optimizer is "adam" (Adam with a decoupled decay is "adamw"), '
                "got 0.1"
            ),
        ),
        (
            ["loss=two_sided", "clip_eps_high=0.28", "clip_delta=1.28"],
            (
                "objective.clip_delta must be > 1 + clip_eps_high = 1.28 (below it the first clip has already acted), "
                "got 1.28"
            ),
        ),
        # clip_eps_high follows clip_eps.
        (
            ["loss=dual_clip", "clip_eps=0.5", "dual_clip=1.4"],
            (
                "objective.dual_clip must be > 1 + clip_eps_high = 1.5 (below it the first clip has already acted), "
                "got 1.4"
            ),
        ),
        (
            ["correction=token_mask"],
            (
                'objective.correction must be "none" when ratio is "recorded", which is already against the worker '
                '(ratio = "recomputed" is not), got "token_mask"'
            ),
        ),
        (
            ["loss=cispo", "ratio=recomputed", "correction=sequence_mask"],
            (
                "objective.correction must be a token's when loss is \"cispo\", which bounds each token's weight so "
                "that all keep a gradient; one weight of the whole completion takes it away again, "
                'got "sequence_mask"'
            ),
        ),
        (
            ["in_flight_updates=true", "workers=0"],
            (
                "rollout.in_flight_updates needs rollout.workers of at least 1 (with 0 nothing is sampled while the "
                "learner updates), got true"
            ),
        ),
        (
            ["in_flight_updates=true", "max_staleness=0"],
            (
                "rollout.in_flight_updates needs rollout.max_staleness of at least 1 (with 0 nothing is being sampled "
                "when new weights come), got true"
            ),
        ),
        (
            ["overlong_tokens=300"],
            "objective.overlong_tokens must be at most max_new_tokens = 256, got 300",
        ),
        (
            ["think_tokens=256"],
            "rollout.think_tokens must be less than max_new_tokens = 256 (the answer needs tokens too), got 256",
        ),
        (
            ["chat_template_kwargs={tokenize=false,x=1}"],
            (
                "data.chat_template_kwargs must not have tokenize (set by the trainer, not a variable of the template), "
                'got { "tokenize" = false, "x" = 1 }'
            ),
        ),
        (
            ["min_success=0.9", "max_success=0.5"],
            (
                "selection.min_success must be at most max_success = 0.5 (else every group is replaced), got 0.9"
            ),
        ),
        (
            ["task=arithmetic", "eval_path=x.jsonl"],
            (
                'data.eval_path must be empty when task is "arithmetic", which makes its own problems '
                '(task = "dataset" reads a file), got "x.jsonl"'
            ),
        ),
        (
            ["task=arithmetic", "num_shots=1"],
            (
                'data.num_shots must be 0 when task is "arithmetic", which has no worked examples (a prompt may be a chat '
                "with its own), got 1"
            ),
        ),
        (
            ["task=reasoning_gym", "gym_task=chain_sum", "path=x.jsonl"],
            (
                'data.path must be empty when task is "reasoning_gym", which makes its own problems '
                '(task = "dataset" reads a file), got "x.jsonl"'
            ),
        ),
        (
            ['trackers=["wandb"]', "log_jsonl=false"],
            'metrics.trackers needs metrics.log_jsonl = true (the trackers read what it writes), got ["wandb"]',
        ),
        (
            ['trackers=["wandb", "wandb"]'],
            'metrics.trackers must name each tracker once, got ["wandb", "wandb"]',
        ),
        (
            ["functions={a=1}", 'sources=[{name="a", weight=1}, {name="b"}]'],
            'data.sources must have a weight for every source or for none, got "b"',
        ),
        (
            ['sources=[{name="a"}, {name="b"}]'],
            "reward.functions must name the rewards of a mixture (each source may choose some of them), got {}",
        ),
        (
            ['eval_sources=[{name="a"}, {name="b", weight=2}]'],
            "evaluator.eval_sources must have no weight (b): all count alike, got 2.0",
        ),
        (
            ["functions={a=1}", 'sources=[{name="a"}]', 'eval_sources=[{name="a"}]'],
            'data.sources must have another name for each source, got "a"',
        ),
        (
            ["functions={a=1, b=1}", 'eval_sources=[{name="s", rewards=["a", "c", "d"]}]'],
            'evaluator.eval_sources must name rewards of reward.functions (a, b) in s, got "c"',
        ),
        (
            ["functions={a=1}", 'sources=[{name="s", task="dataset"}]'],
            (
                "data.sources s: data.path must name a file, folder, function or hub id when task is "
                '"dataset", got ""'
            ),
        ),
        (
            ["functions={a=1}", "metric=b"],
            'evaluator.metric must be one of accuracy, reward, a, got "b"',
        ),
        (
            ["functions={correct=0}"],
            'reward.functions must have a weight other than 0 (else every completion is worth the same), got { "correct" = 0.0 }',
        ),
    ],
)
def test_contradictions_are_refused_with_their_reason(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert str(caught.value) == f"--set: {expected}"


@pytest.mark.parametrize(
    "overrides",
    [
        ("num_generations=2",),
        ("overlong_tokens=256",),
        ("think_tokens=255",),
        ("min_success=0.5", "max_success=0.5"),
        ("loss=two_sided", "clip_eps_high=0.25", "clip_delta=1.26"),
        ("ratio=recomputed", "correction=token_mask"),
        ("loss=cispo", "ratio=recomputed", "correction=token_truncate"),
        ("batch_size=3", "gradient_accumulation_steps=2", "batch_groups=3"),
        ("lora_layers=1",),
        ("optimizer=adamw", "weight_decay=0.1"),
        ("rollout_ranks=2", "rollout_devices=[1, 2, 3, 4]"),
        ("divide_model=true", "fine_tune_type=lora"),
        ("workers=1", "max_staleness=1", "in_flight_updates=true"),
        ("functions={a=0, b=-1}",),
        ("functions={code_tests=1}", "allow_code_execution=true"),
        ("functions={reasoning_gym=1}", "task=reasoning_gym", "gym_task=chain_sum"),
        ("num_shots=3",),
        ("path=gsm8k",),
        # Of a mixture, only the sources must be whole.
        ("functions={a=1}", "task=dataset", 'sources=[{name="a", path="x"}, {name="b", path="y"}]'),
        ("functions={a=1}", 'sources=[{name="a", weight=1}, {name="b", weight=2}]'),
        ("functions={reasoning_gym=1}", 'sources=[{name="a", task="reasoning_gym", gym_task="x"}]'),
        ('eval_sources=[{name="a"}]',),
        ("functions={a=1}", "metric=a"),
        ("functions={a=1}", "metric=accuracy"),
        ("functions={a=1}", "metric=reward"),
        ("metric=a",),
        ("workers=0", "rollout_ranks=1"),
        ("optimizer=adam",),
        ("fine_tune_type=lora", "base_bits=4"),
        ("rollout_ranks=2",),
        ("fine_tune_type=dora",),
        ("divide_gradient=true",),
        ('trackers=["wandb", "trackio"]',),
        ("log_jsonl=false",),
    ],
)
def test_what_lies_on_the_right_side_of_a_rule_is_allowed(overrides):
    load_config(None, overrides)


def test_a_contradiction_names_the_source_that_made_it(tmp_path, monkeypatch):
    # batch_groups comes from the file, which is fine alone; the smaller update comes from --set.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("batch_groups = 4")
    assert load_config("mine.toml").config.groups_per_update % 4 == 0
    with pytest.raises(ConfigError, match=r"^--set: rollout\.batch_groups must divide the 3 groups"):
        load_config("mine.toml", ["batch_size=3", "gradient_accumulation_steps=1"])


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::", "192.168.1.5", "my-mac.local"])  # noqa: S104
def test_tcp_beyond_this_host_uses_keys_unless_insecure_which_warns(host):
    overrides = ["scheme=tcp", f"host={host}"]
    transport = load_config(None, overrides).config.transport
    assert (transport.uses_keys, transport.is_local, transport.warning) == (True, False, None)
    transport = load_config(None, [*overrides, "insecure=true"]).config.transport
    assert (transport.uses_keys, transport.is_local) == (False, False)
    assert transport.warning.startswith(
        f"transport.insecure = true: whoever reaches {host} can join this run"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"])
def test_tcp_on_this_host_uses_keys_too(host):
    transport = load_config(None, ["scheme=tcp", f"host={host}"]).config.transport
    assert (transport.uses_keys, transport.is_local) == (True, True)


def test_unix_sockets_need_no_keys():
    transport = load_config(None, []).config.transport
    assert (transport.uses_keys, transport.is_local, transport.warning) == (False, True, None)


def test_ipc_ignores_the_host():
    assert load_config(None, ["host=example.org"]).notes == ['transport.host has no effect: scheme is "ipc"']
