import mlx.core as mx
import pytest
from evaluated import config
from scores import score
from written import write_checkpoint

from grpo_actors.config import Config, LearnerConfig
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.evaluator.comparison.candidates import find_candidates, load_candidate, pick, settings_of
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoints import mark_best


def write(run_dir, update, policy):
    training = Training(policy.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))
    return write_checkpoint(run_dir, update, policy, training, {}).path


def save_settings(run_dir, **sections):
    (run_dir / "config.json").write_text(config(**sections).model_dump_json())


def settings(folder, file, overrides):
    return settings_of(find_candidates([str(folder)]), file, overrides)


# --- what a name stands for -----------------------------------------------------------------------


def test_a_run_stands_for_its_base_and_its_checkpoints_in_order_and_nothing_comes_twice(run_dir, tiny):
    for update in (10, 9):
        write(run_dir, update, tiny)
    found = find_candidates([str(run_dir / "checkpoint-10"), str(run_dir), "tiny"])
    assert [(candidate.name, candidate.update) for candidate in found] == [
        (f"{run_dir}/checkpoint-10", 10),
        (f"{run_dir}/base", 0),
        (f"{run_dir}/checkpoint-9", 9),
        ("tiny", None),
    ]
    assert [candidate.is_base for candidate in found] == [False, True, False, False]


def test_a_hub_id_is_accepted_and_a_missing_folder_is_refused(run_dir):
    assert find_candidates(["owner/name"])[0].name == "owner/name"
    for missing in (str(run_dir / "checkpoint-2"), "checkpoint-2", str(run_dir)):
        with pytest.raises(ModelError, match=missing):
            find_candidates([missing])


def test_a_run_without_a_checkpoint_is_an_error_that_says_so(run_dir):
    save_settings(run_dir)
    (run_dir / "metrics.jsonl").touch()
    with pytest.raises(ModelError, match=f"^{run_dir}: a run without a checkpoint yet$"):
        find_candidates(["tiny", str(run_dir)])


def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(run_dir, tiny):
    folder = write(run_dir, 1, tiny)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors: not the file that was written.*leave"):
        find_candidates([str(run_dir)])


def test_a_candidate_is_picked_by_the_end_of_its_name_if_only_one_has_it(run_dir, tmp_path, tiny):
    write(run_dir, 1, tiny)
    write(run_dir, 2, tiny)
    mark_best(run_dir, 1, score(0.5))
    candidates = find_candidates([str(run_dir)])
    base, first, second = candidates
    assert [
        pick(name, candidates) for name in ("base", "checkpoint-2", "best", second.name, "checkpoint-3")
    ] == [
        base,
        second,
        first,
        second,
        None,
    ]
    write(tmp_path / "other", 2, tiny)
    candidates += find_candidates([str(tmp_path / "other")])
    with pytest.raises(ConfigError, match=r"checkpoint-2 is .*run/checkpoint-2 and .*other/checkpoint-2"):
        pick("checkpoint-2", candidates)
    assert pick("best", candidates) is None, "of which run?"


# --- by which settings ----------------------------------------------------------------------------


def test_a_checkpoint_is_scored_by_the_settings_of_its_run(run_dir, tiny):
    save_settings(run_dir, run={"seed": 7})
    checkpoint = write(run_dir, 1, tiny)
    assert settings(checkpoint, None, []) == config(run={"seed": 7})
    changed = settings(checkpoint, None, ["max_new_tokens=9", "evaluator.eval_sampled=false"])
    assert (changed.rollout.max_new_tokens, changed.evaluator.eval_sampled, changed.run.seed) == (9, False, 7)
    assert settings(checkpoint, "smoke_test.toml", []).run.seed == 0, "a given file replaces that of the run"
    assert settings(EMBEDDED, None, ["task=arithmetic"]) == Config.model_validate(
        {"data": {"task": "arithmetic"}}
    )


def test_all_candidates_are_evaluated_with_the_settings_of_the_first_run_among_them(run_dir, tmp_path, tiny):
    other = tmp_path / "other"
    other.mkdir()
    for folder, seed in ((run_dir, 7), (other, 8)):
        save_settings(folder, run={"seed": seed})
        write(folder, 1, tiny)
    assert settings_of(find_candidates(["tiny", str(other), str(run_dir)]), None, []).run.seed == 8


def test_overrides_are_checked_together_with_the_settings_of_the_run(run_dir, tiny):
    save_settings(run_dir, model={"fine_tune_type": "lora"})
    checkpoint = write(run_dir, 1, tiny)
    assert settings(checkpoint, None, ["base_bits=8"]).model.base_bits == 8
    with pytest.raises(ConfigError, match=r"base_bits must be 0 when fine_tune_type is"):
        settings(checkpoint, None, ["fine_tune_type=full", "base_bits=8"])


# --- how it is loaded -----------------------------------------------------------------------------


def test_an_adapter_is_loaded_onto_its_runs_base_and_the_base_is_without_it(run_dir, tiny, tiny_lora):
    save_settings(run_dir, model={"dtype": "float32", "fine_tune_type": "lora", "lora_rank": 4})
    tiny_lora.load_trainable({name: array + 0.01 for name, array in tiny_lora.trainable().items()})
    write(run_dir, 1, tiny_lora)
    base, adapter = find_candidates([str(run_dir)])
    tokens = mx.array([[2, 21, 22, 15]])
    assert mx.array_equal(
        load_candidate(adapter, settings_of([adapter], None, [])).model(tokens), tiny_lora.model(tokens)
    )
    assert mx.array_equal(
        load_candidate(base, settings_of([base], None, [])).model(tokens), tiny.model(tokens)
    )
    assert not mx.array_equal(tiny.model(tokens), tiny_lora.model(tokens))
    with pytest.raises(ConfigError, match="fine_tune_type"):
        load_candidate(adapter, config())


def test_a_full_checkpoint_is_loaded_as_a_model_even_if_the_settings_name_an_adapter(run_dir, tiny):
    save_settings(run_dir, model={"dtype": "float32", "fine_tune_type": "lora"})
    [checkpoint] = find_candidates([str(write(run_dir, 1, tiny))])
    assert not load_candidate(checkpoint, settings_of([checkpoint], None, [])).has_adapter
