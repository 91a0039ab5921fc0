"""What a user may name as a model."""

import json
import shutil

import mlx.core as mx
import pytest
from scores import score
from written import write_checkpoint

from grpo_actors.config import LearnerConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoints import mark_best
from grpo_actors.rundir.naming import open_policy, resolve, weights_digest

TOKENS = mx.array([[2, 21, 22, 15]])


def write(run_dir, update, policy):
    training = Training(policy.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))
    return write_checkpoint(run_dir, update, policy, training, {}).path


def moved(policy, by):
    policy.load_trainable({name: array + by for name, array in policy.trainable().items()})
    return policy


def test_a_run_stands_for_its_best_checkpoint_or_before_any_score_for_its_newest(run_dir, tiny):
    first, second = write(run_dir, 1, tiny), write(run_dir, 2, tiny)
    assert resolve(str(run_dir)) == str(second)
    mark_best(run_dir, 1, score(0.5))
    assert resolve(str(run_dir)) == str(first)
    assert resolve(str(second)) == str(second), "a checkpoint stands for itself"


def test_if_no_checkpoint_beat_the_base_model_the_newest_stands_for_the_run_with_a_warning(
    run_dir, tiny, caplog
):
    write(run_dir, 1, tiny)
    second = write(run_dir, 2, tiny)
    mark_best(run_dir, 0, score(0.5))
    assert resolve(str(run_dir)) == str(second)
    (warning,) = caplog.messages
    assert warning == (
        f"{run_dir}: no checkpoint beat the base model "
        "(accuracy, greedy, on 10 held-out problems: 0.500 [0.400, 0.600]); the newest is used"
    )


def test_a_run_without_a_checkpoint_or_with_a_damaged_best_one_is_refused(run_dir, tiny):
    (run_dir / "metrics.jsonl").touch()
    with pytest.raises(ModelError, match="without a checkpoint yet"):
        resolve(str(run_dir))
    folder = write(run_dir, 1, tiny)
    mark_best(run_dir, 1, score(0.5))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"model.safetensors: not the file that was written.*best checkpoint"
    ):
        resolve(str(run_dir))


def test_a_model_folder_with_checkpoints_of_another_tool_is_a_model(tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "trained")
    shutil.copytree(EMBEDDED, folder / "checkpoint-500")
    assert resolve(str(folder)) == str(folder)


def test_other_names_are_left_to_the_loader():
    assert resolve("owner/name") == "owner/name"
    assert resolve("tiny") == "tiny"
    assert resolve(str(EMBEDDED)) == str(EMBEDDED)


@pytest.mark.parametrize("named", ["model", "adapter"])
def test_an_adapter_is_loaded_onto_the_base_that_it_names(named, run_dir, tiny_lora):
    folder = str(write(run_dir, 1, moved(tiny_lora, 0.01)))
    policy = open_policy(folder) if named == "model" else open_policy(None, folder)
    assert mx.array_equal(policy.model(TOKENS), tiny_lora.model(TOKENS))


def test_an_adapter_is_loaded_onto_another_base_if_one_is_named(run_dir, tiny, tiny_lora, tmp_path):
    folder = str(write(run_dir, 1, moved(tiny_lora, 0.01)))
    other = str(write(tmp_path, 7, moved(tiny, 0.5)))
    policy = open_policy(other, folder)
    assert not mx.array_equal(policy.model(TOKENS), tiny_lora.model(TOKENS))
    assert mx.array_equal(
        policy.trainable()["model.layers.0.self_attn.q_proj.lora_b"],
        tiny_lora.trainable()["model.layers.0.self_attn.q_proj.lora_b"],
    )


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"lora_parameters": {"rank": 4}}, "'scale' is missing"),
        ({"lora_parameters": None}, "does not describe an adapter"),
        ({"fine_tune_type": "ia3"}, "fine_tune_type"),
    ],
)
def test_an_adapter_that_is_badly_described_is_refused_in_one_line(change, rule, run_dir, tiny_lora):
    folder = write(run_dir, 1, tiny_lora)
    description = folder / "adapter_config.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | change))
    with pytest.raises(ModelError, match=rule) as caught:
        open_policy(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no adapter folder \(neither adapters.safetensors nor PEFT"):
        open_policy("tiny", str(tmp_path))


def test_an_adapter_that_names_no_base_is_loaded_on_the_one_that_is_named(run_dir, tiny_lora):
    folder = write(run_dir, 1, moved(tiny_lora, 0.01))
    description = folder / "adapter_config.json"
    described = json.loads(description.read_text())
    del described["model"]
    description.write_text(json.dumps(described))
    with pytest.raises(ModelError, match="does not name its base model; name it"):
        open_policy(str(folder))
    policy = open_policy("tiny", str(folder))
    assert weights_digest(policy) == weights_digest(tiny_lora)


def test_the_digest_covers_the_base_and_the_adapter(run_dir, tiny, tiny_lora, tmp_path):
    plain = weights_digest(open_policy("tiny"))
    one = weights_digest(open_policy(str(write(run_dir, 1, moved(tiny_lora, 0.01)))))
    two = weights_digest(open_policy(str(write(run_dir, 2, moved(tiny_lora, 0.01)))))
    again = weights_digest(open_policy(shutil.copytree(run_dir / "checkpoint-1", tmp_path / "copy")))
    other = weights_digest(open_policy(str(write(tmp_path, 3, moved(tiny, 0.5)))))
    assert len({plain, one, two, other}) == 4
    assert again == one
