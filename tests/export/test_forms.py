"""Which checkpoint of a run is exported, and what an adapter's folder says of its base."""

import json

import pytest
from checkpoint_files import write_checkpoint_files
from scores import score
from written import write_checkpoint

from grpo_actors.config import Config, LearnerConfig, ModelConfig
from grpo_actors.errors import RunError
from grpo_actors.export.forms import Export
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoints import mark_best


@pytest.fixture
def chosen(run_dir):
    """Return a function that chooses a checkpoint of a run with three of them, and returns its number."""
    (run_dir / "config.json").write_text(Config().model_dump_json())
    for update in (2, 4, 10):
        write_checkpoint_files(run_dir, update)
    return lambda which: Export.choose(run_dir, which).checkpoint.update


def test_without_a_best_checkpoint_the_newest_is_exported(chosen):
    assert [chosen(which) for which in ("", "last", "4", "2")] == [10, 10, 4, 2]


def test_the_best_is_exported_unless_another_is_named(chosen, run_dir):
    mark_best(run_dir, 4, score(0.5))
    assert [chosen(which) for which in ("", "best", "last", "2", "10")] == [4, 4, 10, 2, 10]


def test_where_none_beat_the_base_the_newest_is_exported_and_there_is_no_best(chosen, run_dir):
    mark_best(run_dir, 0, score(0.5))
    assert [chosen(which) for which in ("", "last")] == [10, 10]
    with pytest.raises(
        RunError, match=r"--checkpoint best: no checkpoint of .* has beaten the base model; take last"
    ):
        chosen("best")


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(chosen):
    with pytest.raises(RunError, match=r"--checkpoint must be best, last or one of 2, 4, 10, got 3$"):
        chosen("3")


def never_called(*_):
    raise AssertionError("nothing trains here")


@pytest.mark.parametrize(("for_others", "base"), [(True, "tiny"), (False, str(EMBEDDED))])
def test_an_adapter_names_its_base_by_its_folder_only_on_this_machine(
    run_dir, tmp_path, request, for_others, base
):
    base = EMBEDDED.name if for_others else base
    for kind, fixture in (("lora", "tiny_lora"), ("full", "tiny")):
        policy = request.getfixturevalue(fixture)
        settings = ModelConfig(dtype="float32", fine_tune_type=kind, lora_rank=4)
        folder = run_dir / kind
        folder.mkdir()
        (folder / "config.json").write_text(Config(model=settings).model_dump_json())
        write_checkpoint(folder, 1, policy, Training(policy.model, LearnerConfig(), never_called), {})
        export = Export.choose(folder, "")
        written = tmp_path / f"{kind}-written"
        written.mkdir()
        export.write_adapter(written, "mine", for_others=for_others)
        described = json.loads((written / "adapter_config.json").read_text())
        assert (described["fine_tune_type"], described["model"]) == (kind, base)
        assert not (written / "chat_template.jinja").exists(), "that of the base does"
        assert (written / "README.md").read_text().count("library_name: mlx\n") == 1
