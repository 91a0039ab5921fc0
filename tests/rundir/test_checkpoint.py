import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from written import write_checkpoint

from grpo_actors.config import LearnerConfig, ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoint_weights import companions, load_weights, load_whole, restore, write_model
from grpo_actors.rundir.checkpoints import find_checkpoints, read_state, verify
from grpo_actors.schedule.lease import Cursor

PROMPT = [2, 21, 22, 15, 23, 24, 1, 3]
TARGETS = [9, 8, 7, 6]


def likelihood(model, arrays):
    logprobs, _ = completion_logprobs(
        model, mx.array([PROMPT + TARGETS]), mx.array([len(PROMPT) - 1]), mx.array([TARGETS]), 1.0
    )
    return -logprobs.sum(), logprobs.sum()[None]


def trained(policy, steps=3):
    training = Training(policy.model, LearnerConfig(), likelihood)
    advance(training, steps)
    return training


def advance(training, steps):
    for _ in range(steps):
        training.accumulate({})
        training.step(1e-2)


def greedy(policy, tokens=20):
    [[sample]] = sample_groups(policy, [PROMPT], [[0]], SamplingParams(tokens, temperature=0.0))
    return sample.tokens


def greedy_by_mlx_lm(model, tokens):
    steps = generate_step(mx.array(PROMPT), model, max_tokens=tokens)
    return [int(token) for token, _ in steps]


@pytest.fixture(params=["full", "lora", "dora"])
def policy(request):
    return load_policy(ModelConfig(dtype="float32", fine_tune_type=request.param, lora_rank=4), seed=0)


def test_mlx_lm_loads_a_checkpoint_and_generates_what_the_policy_generates(policy, run_dir):
    before = greedy(policy)
    checkpoint = write_checkpoint(run_dir, 3, policy, trained(policy), {})
    expected = greedy(policy)
    assert expected != before, "the training must change the output, or this test shows nothing"
    if policy.has_adapter:
        model, tokenizer = mlx_lm.load(str(EMBEDDED), adapter_path=str(checkpoint.path))
        model.set_dtype(mx.float32)
    else:
        model, tokenizer = mlx_lm.load(str(checkpoint.path))
    assert greedy_by_mlx_lm(model, len(expected)) == expected
    assert tokenizer.encode("12 + 34") == policy.tokenizer.encode("12 + 34")
    assert tokenizer.chat_template == policy.tokenizer.chat_template


def test_a_full_checkpoint_is_a_complete_model_folder(tiny, run_dir):
    checkpoint = write_checkpoint(run_dir, 1, tiny, trained(tiny), {})
    names = {path.name for path in checkpoint.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    loaded = load_policy(ModelConfig(model_name=str(checkpoint.path), dtype="float32"), seed=0)
    assert greedy(loaded) == greedy(tiny)
    # transformers casts weights to the type that config.json names: the embedded model's says bfloat16.
    assert json.loads((checkpoint.path / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_tokenizer_with_several_templates_is_saved_with_its_subfolder(tmp_path, run_dir):
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    policy = load_policy(ModelConfig(model_name=str(source), dtype="float32"), seed=0)
    assert set(policy.tokenizer.chat_template) == {"default", "tool_use"}
    checkpoint = write_checkpoint(run_dir, 1, policy, trained(policy), {})
    assert verify(checkpoint) is None
    assert checkpoint.bytes == sum(
        path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file()
    )
    loaded = load_policy(ModelConfig(model_name=str(checkpoint.path)), seed=0)
    assert loaded.tokenizer.chat_template == policy.tokenizer.chat_template

    inside = checkpoint.path / "additional_chat_templates" / "tool_use.jinja"
    inside.write_text("{{ other }}")
    assert verify(checkpoint) == f"{inside}: not the file that was written (size or sha256 differs)"
    inside.rename(inside.with_name("other.jinja"))
    assert verify(checkpoint) == f"{inside}: is missing"
    shutil.copy(inside.with_name("other.jinja"), inside)
    assert "its manifest.json does not list it" in str(verify(checkpoint))


def test_a_source_that_is_gone_after_the_start_costs_no_checkpoint(tmp_path, run_dir):
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    policy = load_policy(ModelConfig(model_name=str(source), dtype="float32"), seed=0)
    expected = companions(policy)  # as a run does before its first update
    shutil.rmtree(source)
    folder = write_checkpoint(run_dir, 1, policy, trained(policy), {}).path
    assert {name: (folder / name).read_bytes() for name in expected} == expected


def test_a_folder_that_is_called_like_a_file_to_take_over_is_left_out(tmp_path):
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    (source / "LICENSES").mkdir()
    (source / "tokenizer").mkdir()
    policy = load_policy(ModelConfig(model_name=str(source), dtype="float32"), seed=0)
    assert set(companions(policy)) == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_the_code_of_a_model_stays_where_it_is(run_dir, tmp_path):
    """Whoever opens the checkpoint would have to trust it. Its own run's settings say where the code is."""
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    (source / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    architecture = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(architecture | {"model_file": "own.py"}))
    settings = ModelConfig(model_name=str(source), dtype="float32", trust_remote_code=True)
    policy = load_policy(settings, seed=0)
    folder = write_checkpoint(run_dir, 1, policy, trained(policy), {}).path
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", policy)
    for written in (folder, tmp_path / "model"):
        assert (written / "config.json").is_file()
        assert list(written.glob("*.py")) == []
        assert greedy(load_whole(written, settings)) == greedy(policy)
        with pytest.raises(ModelError, match=f"'{written}' cannot be loaded"):
            load_whole(written, settings.model_copy(update={"trust_remote_code": False}))


def test_training_continues_bit_for_bit_from_restored_weights_and_optimizer(policy, run_dir):
    training = trained(policy)
    checkpoint = write_checkpoint(run_dir, 3, policy, training, {"cursor": {"position": 7, "set_aside": [9]}})
    advance(training, 3)

    other = load_policy(policy.config, seed=1)
    resumed = Training(other.model, LearnerConfig(), likelihood)
    restore(checkpoint, other, resumed)
    state = read_state(checkpoint)
    assert (state.update, state.cursor) == (3, Cursor(7, (9,)))
    assert resumed.optimizer.step.item() == 3
    advance(resumed, 3)
    for name, array in policy.trainable().items():
        assert mx.array_equal(array, other.trainable()[name]), name
    for name, array in training.state().items():
        assert mx.array_equal(array, resumed.state()[name]), name


@pytest.mark.parametrize("optimizer", ["muon", "lion", "adafactor"])
@pytest.mark.parametrize("bits", [0, 4])
def test_every_optimizer_continues_bit_for_bit(optimizer, bits, run_dir):
    settings = LearnerConfig(optimizer=optimizer, weight_decay=0.1)
    kind = "lora" if bits else "full"
    model = ModelConfig(dtype="float32", fine_tune_type=kind, base_bits=bits)
    policy, other = load_policy(model, seed=0), load_policy(model, seed=1)
    training = Training(policy.model, settings, likelihood)
    advance(training, 2)
    checkpoint = write_checkpoint(run_dir, 2, policy, training, {})
    resumed = Training(other.model, settings, likelihood)
    restore(checkpoint, other, resumed)
    advance(training, 1)
    advance(resumed, 1)
    for name, array in (policy.trainable() | training.state()).items():
        assert mx.array_equal(array, (other.trainable() | resumed.state())[name]), name


def test_a_half_precision_run_resumes_with_its_float32_weights(run_dir):
    settings = ModelConfig(dtype="bfloat16")
    policy, other = load_policy(settings, seed=0), load_policy(settings, seed=0)
    training = trained(policy)
    checkpoint = write_checkpoint(run_dir, 3, policy, training, {})
    resumed = Training(other.model, LearnerConfig(), likelihood)
    restore(checkpoint, other, resumed)
    for name, array in training.state().items():
        assert mx.array_equal(array, resumed.state()[name]), name
    assert any(name.startswith("weights.") for name in training.state())


def test_an_adapter_on_the_last_layers_only_is_restored(run_dir):
    settings = ModelConfig(dtype="float32", fine_tune_type="lora", lora_layers=1)
    policy, other = load_policy(settings, seed=0), load_policy(settings, seed=5)
    checkpoint = write_checkpoint(run_dir, 3, policy, trained(policy), {})
    resumed = Training(other.model, LearnerConfig(), likelihood)
    restore(checkpoint, other, resumed)
    advance(resumed, 1)
    model, _ = mlx_lm.load(str(EMBEDDED), adapter_path=str(checkpoint.path))
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(
        np.array(model(mx.array([PROMPT]))), np.array(policy.model(mx.array([PROMPT]))), atol=1e-5
    )


def test_one_policy_loads_several_checkpoints_one_after_another(policy, run_dir):
    training = trained(policy)
    first = write_checkpoint(run_dir, 1, policy, training, {})
    expected_first = greedy(policy)
    advance(training, 10)
    second = write_checkpoint(run_dir, 2, policy, training, {})
    expected_second = greedy(policy)
    reader = load_policy(policy.config, seed=3)
    for checkpoint, expected in ((second, expected_second), (first, expected_first)):
        load_weights(checkpoint.path, reader)
        assert greedy(reader) == expected


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tiny, tiny_lora, run_dir):
    checkpoint = write_checkpoint(run_dir, 1, tiny_lora, trained(tiny_lora), {})
    before = greedy(tiny)
    with pytest.raises(ModelError, match="do not fit"):
        load_weights(checkpoint.path, tiny)
    assert greedy(tiny) == before


def test_a_folder_without_weights_and_one_with_broken_ones_are_refused(tiny, run_dir):
    with pytest.raises(ModelError, match="no weights"):
        load_weights(run_dir, tiny)
    (run_dir / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="not a readable safetensors"):
        load_weights(run_dir, tiny)


def test_only_a_resume_reads_the_training_state(tiny, run_dir):
    training = trained(tiny)
    reference = {name: array + 1 for name, array in tiny.trainable().items()}
    checkpoint = write_checkpoint(run_dir, 3, tiny, training, {}, reference=reference)
    for name in ("optimizer.safetensors", "reference.safetensors"):
        whole = (checkpoint.path / name).read_bytes()
        (checkpoint.path / name).write_bytes(whole[:-1])
        assert verify(checkpoint) is None
        assert str(checkpoint.path / name) in str(verify(checkpoint, to_resume=True))
        (checkpoint.path / name).write_bytes(whole)
    assert verify(checkpoint, to_resume=True) is None


def test_a_state_of_several_files_is_restored_whole(tiny, run_dir):
    training = trained(tiny)
    # 2.8 MB of weights and twice as much of moments, in files of 1 MiB.
    checkpoint = write_checkpoint(run_dir, 3, tiny, training, {}, shard_bytes=1 << 20)
    assert len(list(checkpoint.path.glob("model-0*-of-00003.safetensors"))) == 3
    assert len(list(checkpoint.path.glob("optimizer-0*-of-00006.safetensors"))) == 6
    model, _ = mlx_lm.load(str(checkpoint.path))
    expected = greedy(tiny)
    assert greedy_by_mlx_lm(model, len(expected)) == expected
    other = load_policy(tiny.config, seed=1)
    resumed = Training(other.model, LearnerConfig(), likelihood)
    restore(checkpoint, other, resumed)
    for name, array in (tiny.trainable() | training.state()).items():
        assert mx.array_equal(array, (other.trainable() | resumed.state())[name]), name


def test_a_checkpoint_written_again_replaces_the_damaged_one(tiny, run_dir):
    training = trained(tiny)
    checkpoint = write_checkpoint(run_dir, 4, tiny, training, {"records": 1})
    (checkpoint.path / "state.json").write_text("{")
    assert write_checkpoint(run_dir, 4, tiny, training, {"records": 2}) == checkpoint
    assert find_checkpoints(run_dir) == [checkpoint]
    assert verify(checkpoint) is None
    assert read_state(checkpoint).records == 2
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-4"]
