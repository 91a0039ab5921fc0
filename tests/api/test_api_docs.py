"""The examples in the API's docstrings give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["models", "evaluation", "training"])
def test_examples_of_docstrings(name):
    module = importlib.import_module(f"grpo_actors.api.{name}")
    api = importlib.import_module("grpo_actors.api")
    names = {public: getattr(api, public) for public in api.__all__}
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert failed == 0
    assert tried > 0
