"""What the learner checks before the first batch."""

import pytest
from hand_made import MAX_NEW, config, learner

from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.learner.loading import check_sampling, turn_end_note
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
