"""The stage: which settings need it, how its processes share their kernels, how it ends early."""

import os
from pathlib import Path

import pytest
from stand_in import CODE, write_kernel

from grpo_actors.config import Config
from grpo_actors.kernels import stage
from grpo_actors.kernels.stage import Stage, parts_of

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
BUILD = "mlx_cuda_13-0.32.4"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    write_kernel(folder, "Known")
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder))
    return folder


def stage_of(**sections) -> Stage:
    found = Stage.find(Config.model_validate(sections), BUILD)
    assert found is not None
    return Stage(found.config, found.cache, found.marker, program=(STAND_IN,))


def test_without_cuda_or_a_cache_there_is_no_stage(cache, monkeypatch):
    assert Stage.find(Config(), None) is None
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    assert Stage.find(Config(), BUILD) is None


def test_parts_publish_what_they_compile_and_get_what_others_have(cache):
    shown = []
    outcomes = {outcome.part: outcome for outcome in stage_of().run(shown.append, processes=3)}
    assert list(outcomes) != []
    assert sorted(outcomes) == sorted(parts_of(Config()))
    assert {part: list(outcome.kernels) for part, outcome in outcomes.items() if outcome.kernels} == {
        "loss": ["Add"],
        "body": ["Multiply/Exp"],
    }
    assert shown[-1] == 2
    names = sorted(str(path.relative_to(cache)) for path in cache.rglob("*.ptx"))
    assert names == ["Add.ptx", "Known.ptx", "Multiply/Exp.ptx"]
    assert (cache / "Multiply/Exp.ptx").read_bytes() == CODE


def test_a_part_that_fails_gives_its_last_line_and_the_others_go_on(cache):
    failures = {outcome.part: outcome.failure for outcome in stage_of().run(processes=3)}
    assert failures.pop("head") == "ModelError: too exotic"
    assert set(failures.values()) == {""}
    assert not (cache / "Half.ptx").exists()


def test_the_marker_makes_the_next_run_skip_the_stage_but_not_one_with_other_kernels(cache):
    assert not stage_of().is_done
    for _ in stage_of().run(processes=3):
        pass
    assert stage_of().is_done
    # Neither lengths nor the number of updates decide; the loss and a constant of the optimizer do.
    assert stage_of(rollout={"max_new_tokens": 99}, learner={"max_updates": 7}, run={"seed": 1}).is_done
    assert not stage_of(objective={"loss": "cispo"}).is_done
    assert not stage_of(learner={"adam_beta2": 0.95}).is_done
    assert not stage_of(evaluator={"eval_every_updates": 0}).is_done
    assert not Stage.find(Config(), "mlx_cuda_13-0.33.0").is_done


def test_another_model_of_the_same_name_is_not_done(cache, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"head_dim": 64}')
    first = stage_of(model={"model_name": str(tmp_path)})
    (tmp_path / "config.json").write_text('{"head_dim": 128}')
    assert first.marker != stage_of(model={"model_name": str(tmp_path)}).marker


def test_a_part_that_takes_too_long_is_ended_and_has_failed(cache, tmp_path, monkeypatch):
    (tmp_path / "pids").mkdir()
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))  # every part runs until it is killed
    monkeypatch.setattr(stage, "PART_S", 0.0)
    outcomes = list(stage_of().run(processes=3))
    assert sorted(outcome.part for outcome in outcomes) == sorted(parts_of(Config()))
    assert {outcome.failure for outcome in outcomes} == {"not done after 0 s"}


def test_giving_up_ends_all_parts_at_once_and_nothing_is_marked(cache, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("PIDS", str(pids))
    given = stage_of()
    assert list(given.run(gives_up=lambda: len(list(pids.iterdir())) == 3, processes=3)) == []
    for path in pids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)
    assert not given.is_done
