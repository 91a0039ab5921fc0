"""Chat templates that bring along the prompt of the training."""

import pytest

from grpo_actors.policy.carried import carried_system, carrying, template_text

SYSTEM = 'Say "so", then\n{% raw %}\\ %} {{ x }} 🙂 in <answer> tags.'
QUESTION = {"role": "user", "content": "12"}
OTHER = {"role": "system", "content": "Be brief."}


@pytest.fixture
def asked(tiny):
    """A function that renders a chat with a template around the embedded model's own, and given variables."""
    own = template_text(tiny.tokenizer)

    def render(*chat, system="", settings=(), **variables):
        tiny.chat.use(carrying(own, system, dict(settings)))
        tiny.chat.settings = variables
        return tiny.chat.render(chat, asks=False)

    return render


def test_a_chat_without_a_system_prompt_gets_that_of_the_training(asked):
    assert asked(QUESTION, system=SYSTEM) == asked({"role": "system", "content": SYSTEM}, QUESTION)


def test_a_chat_keeps_its_own_and_no_system_leaves_it_out(asked):
    assert asked(OTHER, QUESTION, system=SYSTEM) == asked(OTHER, QUESTION)
    assert asked(QUESTION, system=SYSTEM, no_system=True) == asked(QUESTION)


def test_variables_have_the_values_of_the_training_unless_others_are_given(tiny):
    settings = {"thinks": False, "nothing": None, "words": {"a": ["b", 1.5, True]}}
    tiny.chat.use(carrying("{{ thinks }} {{ nothing }} {{ words }}", "", settings))
    assert tiny.chat.render([QUESTION]) == "False None {'a': ['b', 1.5, True]}"
    tiny.chat.settings = {"thinks": 3}
    assert tiny.chat.render([QUESTION]).startswith("3 ")


def test_the_system_prompt_is_found_again_and_nothing_in_a_template_without_one():
    assert carried_system(carrying("{{ messages }}", SYSTEM, {"a": 1})) == SYSTEM
    assert carried_system("{{ messages }}") == ""
    assert carrying(" {{ messages }}", "", {}) == " {{ messages }}"
