"""What the learner checks before the first batch."""

import pytest
from hand_made import config, learner

from grpo_actors.errors import ModelError
from grpo_actors.learner.loading import check_sampling
from grpo_actors.policy import model
from grpo_actors.tasks.task import Problem

PROBLEM = Problem("p", ({"role": "user", "content": "1 + 1?"},), "2", {})


def test_a_chat_template_that_loops_for_hours_is_found_at_the_first_problem(monkeypatch):
    settings = config()
    grpo = learner(settings)
    check_sampling(settings, grpo.policy, PROBLEM)
    monkeypatch.setattr(model, "TEMPLATE_S", 0.1)
    grpo.policy.tokenizer.chat_template = 3 * "{% for i in range(100000) %}" + 3 * "{% endfor %}"
    with pytest.raises(ModelError, match="its chat template does not end within"):
        check_sampling(settings, grpo.policy, PROBLEM)
