"""What errors say: one line, the file, the nearest known name."""

import pickle

import pytest

from grpo_actors import errors
from grpo_actors.errors import GrpoActorsError, RunError, first_line, nearest, os_errors_in_one_line

KNOWN = ["learning_rate", "learner_rate", "batch_size"]


def test_every_error_is_of_one_tree_and_crosses_a_process_border():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    for kind in kinds:
        assert issubclass(kind, GrpoActorsError)
        copy = pickle.loads(pickle.dumps(kind("one line")))  # noqa: S301 - from the line before
        assert (type(copy), str(copy)) == (kind, "one line")


def test_an_error_of_the_system_names_the_file(tmp_path):
    with pytest.raises(RunError) as caught, os_errors_in_one_line():
        (tmp_path / "absent").read_text()
    assert str(caught.value) == f"{tmp_path}/absent: No such file or directory"


def test_without_a_file_or_a_number_it_says_what_there_is():
    with pytest.raises(RunError, match=r"^Broken pipe$"), os_errors_in_one_line():
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(RunError, match=r"^cannot resolve$"), os_errors_in_one_line():
        raise OSError("cannot resolve")


def test_other_errors_pass():
    with pytest.raises(ValueError, match="x"), os_errors_in_one_line():
        raise ValueError("x")


def test_the_nearest_names_are_offered_or_something_else():
    assert nearest("learning_rat", KNOWN) == "; did you mean learning_rate?"
    assert nearest("learning_rat", KNOWN, count=2) == "; did you mean learning_rate or learner_rate?"
    assert nearest("learning_rat", KNOWN, show=repr) == "; did you mean 'learning_rate'?"
    assert nearest("xyz", KNOWN) == ""
    assert nearest("xyz", KNOWN, otherwise="; see --help") == "; see --help"


def test_the_first_line_of_an_error_is_its_text_or_its_kind():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
