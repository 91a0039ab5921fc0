"""What the learner checks before the first batch."""

import pytest
from hand_made import MAX_NEW, config, learner

from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.learner.loading import check_sampling
from grpo_actors.policy import model
from grpo_actors.policy.thinking import Tags, Thinking
from grpo_actors.tasks.task import Problem

PROBLEM = Problem("p", ({"role": "user", "content": "1 + 1?"},), "2", {})


def test_a_chat_template_that_loops_for_hours_is_found_at_the_first_problem(monkeypatch):
    settings = config()
    grpo = learner(settings)
    check_sampling(settings, grpo, PROBLEM)
    monkeypatch.setattr(model, "TEMPLATE_S", 0.1)
    grpo.policy.tokenizer.chat_template = 3 * "{% for i in range(100000) %}" + 3 * "{% endfor %}"
    with pytest.raises(ModelError, match="its chat template does not end within"):
        check_sampling(settings, grpo, PROBLEM)


def test_a_bound_on_thinking_needs_a_closing_tag_and_tokens_after_it():
    settings = config(think_tokens=MAX_NEW - 2)
    grpo = learner(settings)
    with pytest.raises(
        ConfigError, match=r"rollout.think_tokens: must be 0 for tiny, whose vocabulary has no tag"
    ):
        check_sampling(settings, grpo, PROBLEM)
    grpo.policy.thinking = Thinking(Tags("a", "b"), start=(5,), end=(6,), closing=(7, 6))
    with pytest.raises(
        ConfigError, match="less than the 24 tokens of a completion minus the 2 of the closing tag"
    ):
        check_sampling(settings, grpo, PROBLEM)
    grpo.policy.thinking = Thinking(Tags("a", "b"), start=(5,), end=(6,), closing=(6,))
    check_sampling(settings, grpo, PROBLEM)
