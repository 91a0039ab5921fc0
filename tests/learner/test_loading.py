"""What the learner checks before the first batch."""

import contextlib

import pytest
from architectures import random_policy
from hand_made import MAX_NEW, config, learner

from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.learner.loading import check_decoding, check_sampling, load_model, turn_end_note
from grpo_actors.policy import chat_template
from grpo_actors.policy.thinking import Tags, Thinking
from grpo_actors.tasks.task import Problem

PROBLEM = Problem("p", ({"role": "user", "content": "1 + 1?"},), "2", {})


def forget_the_end(policy):
    for found in ("chat", "stop_tokens"):
        policy.__dict__.pop(found, None)


def test_what_ends_a_turn_is_said_where_the_models_settings_do_not_say_it():
    settings = config()
    policy = learner(settings).policy
    assert turn_end_note(settings, policy) is None

    policy.tokenizer.eos_token_ids = [5]  # no token of the template
    forget_the_end(policy)
    assert "ends a turn with <|end|>, which its eos_token_id lacks" in str(turn_end_note(settings, policy))

    policy.chat.use("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    forget_the_end(policy)
    assert "completions may never end" in str(turn_end_note(settings, policy))
    stops = {"rollout": settings.rollout.model_copy(update={"stop": ("\n",)})}
    assert turn_end_note(settings.model_copy(update=stops), policy) is None


def test_a_chat_template_that_loops_for_hours_is_found_at_the_first_problem(monkeypatch):
    settings = config()
    grpo = learner(settings)
    check_sampling(settings, grpo.policy, PROBLEM)
    monkeypatch.setattr(chat_template, "TEMPLATE_S", 0.1)
    grpo.policy.tokenizer.chat_template = 3 * "{% for i in range(100000) %}" + 3 * "{% endfor %}"
    with pytest.raises(ModelError, match="its chat template does not end within"):
        check_sampling(settings, grpo.policy, PROBLEM)


@pytest.mark.parametrize(
    ("family", "settings", "refused"),
    [
        ("llama", {"in_flight_updates": True}, None),
        ("mamba", {"in_flight_updates": True}, r"rollout.in_flight_updates: must be false"),
        ("mamba", {"kv_bits": 8}, r"rollout.kv_bits: must be 0"),
        (
            "mamba",
            {"rollout_ranks": 2},
            r"rollout.rollout_ranks: must be 1 .* mlx-lm cannot divide a mamba, got 2",
        ),
    ],
)
def test_a_model_that_cannot_be_decoded_with_the_settings_is_refused(family, settings, refused):
    policy, rollout = random_policy(family), config().rollout.model_copy(update=settings)
    asked = config().model_copy(update={"rollout": rollout})
    with contextlib.nullcontext() if refused is None else pytest.raises(ConfigError, match=refused):
        check_decoding(asked, policy)


def test_a_model_that_cannot_be_batched_continuously_has_no_environment():
    turns = load_config(None, ["task=arithmetic", "environment=calculator"]).config
    check_decoding(turns, random_policy("llama"))
    with pytest.raises(ConfigError, match="environment"):
        check_decoding(turns, random_policy("mamba"))


def test_an_environment_needs_a_template_that_takes_another_turn(monkeypatch):
    turns = load_config(None, ["task=arithmetic", "environment=calculator"]).config
    policy = learner(config()).policy
    check_sampling(turns, policy, PROBLEM)
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index > 1 %}{{ raise_exception('one turn') }}{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
    )
    forget_the_end(policy)
    check_sampling(config(), policy, PROBLEM)
    with pytest.raises(ModelError, match="refuses"):
        check_sampling(turns, policy, PROBLEM)


def test_a_model_is_loaded_with_the_chat_template_of_the_settings():
    template = "{% for m in messages %}{{ m.content }}{{ word }}{% endfor %}"
    data = {"chat_template": template, "chat_template_kwargs": {"word": "!"}}
    settings = config()
    policy = load_model(settings.model_copy(update={"data": settings.data.model_copy(update=data)}))
    assert policy.tokenizer.decode(policy.chat.encode([{"role": "user", "content": "5"}])) == "5!"


def test_a_name_that_is_no_folder_is_said_to_be_one_of_the_hub(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_model(config())
    assert capsys.readouterr().err == ""
    with pytest.raises(ModelError):
        load_model(config(model={"model_name": "owner/none"}))
    assert capsys.readouterr().err.startswith("model owner/none: no such folder here, so from the hub")


def test_a_bound_on_thinking_needs_a_closing_tag_and_tokens_after_it():
    settings = config(think_tokens=MAX_NEW - 2)
    grpo = learner(settings)
    with pytest.raises(
        ConfigError, match=r"rollout.think_tokens: must be 0 for tiny, whose vocabulary has no tag"
    ):
        check_sampling(settings, grpo.policy, PROBLEM)
    grpo.policy.thinking = Thinking(Tags("a", "b"), start=(5,), end=(6,), closing=(7, 6))
    with pytest.raises(
        ConfigError, match="less than the 24 tokens of a completion minus the 2 of the closing tag"
    ):
        check_sampling(settings, grpo.policy, PROBLEM)
    grpo.policy.thinking = Thinking(Tags("a", "b"), start=(5,), end=(6,), closing=(6,))
    check_sampling(settings, grpo.policy, PROBLEM)
