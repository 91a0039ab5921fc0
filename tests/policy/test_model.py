import gc
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn
from mlx.utils import tree_flatten

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.identity import excerpts_of, identify
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import deviation, load_policy, resolve_dtype, same_logits

TOKENS = mx.array([[2, 21, 22, 15, 23, 24, 1, 3, 9, 9]])


def load(name, **settings):
    return load_policy(ModelConfig(model_name=str(name), **settings), seed=0)


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json not found"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda f: edit(f / "config.json", model_type="nonsense"), "nonsense"),
        (lambda f: edit(f / "config.json", hidden_size=64), "cannot be loaded"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "cannot be loaded"),
        (
            lambda f: edit(f / "config.json", hidden_act=5),
            "transformers refuses its config.json: .*hidden_act",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04 not safetensors"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (EMBEDDED / "model.safetensors").read_bytes()[:-9]
            ),
            "cannot",
        ),
    ],
)
def test_an_unusable_folder_raises_an_error_of_one_line_that_names_it(folder, fault, rule):
    fault(folder)
    with pytest.raises(ModelError, match=rule) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "no-such-model", "a/b/c"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ModelError, match="no folder"):
        load(name)


def test_every_stop_token_of_the_generation_settings_counts(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5, 7]}')
    assert load(folder).stop_tokens == {1, 5, 7}


def test_auto_means_float32_on_a_cpu_and_the_files_own_type_elsewhere():
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    for stored, own in (("bfloat16", mx.bfloat16), ("float16", mx.float16)):
        assert resolve_dtype("auto", {"torch_dtype": stored}) == (mx.float32 if on_cpu else own)
    assert resolve_dtype("float16", {"torch_dtype": "bfloat16"}) == mx.float16


@pytest.mark.parametrize(
    ("dtype", "difference", "same"),
    [
        *((mx.float32, difference, difference == 0.003) for difference in (0.003, -0.01, 0.01)),
        *((mx.bfloat16, difference, abs(difference) == 0.1) for difference in (0.1, -0.1, 0.4, -0.4)),
    ],
)
@pytest.mark.skipif(mx.default_device().type == mx.DeviceType.gpu, reason="rounds more")
def test_logits_are_the_same_if_they_differ_by_a_small_share_of_their_deviation(dtype, difference, same):
    logits = 7 * mx.random.normal((1000,), key=mx.random.key(0))
    other = logits + difference * mx.std(logits)
    assert deviation(other, logits) == pytest.approx(abs(difference), rel=0.01)
    assert same_logits(other.astype(dtype), logits.astype(dtype)) is same


def test_a_temperature_of_0_counts_as_1_and_others_divide_the_logits(tiny):
    def logprobs(temperature):
        tokens, targets = mx.array([[2, 21, 22, 15]]), mx.array([[22, 15]])
        found, entropies = completion_logprobs(tiny.model, tokens, mx.array([1]), targets, temperature)
        logits = tiny.model(tokens)[0, 1:3] / (temperature or 1.0)
        expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(expected, targets[0][:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(found[0], chosen, atol=1e-5)
        np.testing.assert_allclose(entropies[0], -(mx.exp(expected) * expected).sum(axis=-1), atol=1e-5)
        return found.tolist()

    assert logprobs(0.0) == logprobs(1.0) != logprobs(2.0)


# --- what trains ----------------------------------------------------------------------------------


def test_either_all_weights_or_only_the_adapter_train(tiny, tiny_lora):
    assert len(tiny.trainable()) == len(tree_flatten(tiny.model.parameters()))
    assert {name.rpartition(".")[2] for name in tiny_lora.trainable()} == {"lora_a", "lora_b"}


def test_an_adapter_on_the_last_layers_leaves_the_first_ones_unchanged():
    names = load("tiny", fine_tune_type="lora", lora_layers=1, lora_keys=("self_attn.q_proj",)).trainable()
    assert sorted(names) == [f"model.layers.3.self_attn.q_proj.lora_{x}" for x in "ab"]


def test_with_its_initial_adapter_a_policy_equals_its_base(tiny, tiny_lora):
    first = tiny_lora.trainable()
    shifted = {name: array + 0.05 for name, array in tiny_lora.trainable().items()}
    tiny_lora.load_trainable(shifted)
    base = tiny.model(TOKENS)
    with tiny_lora.holding(first):
        np.testing.assert_allclose(np.array(tiny_lora.model(TOKENS)), np.array(base), atol=1e-5)
    assert mx.abs(tiny_lora.model(TOKENS) - base).max() > 0.1


def test_a_policy_has_its_own_weights_again_after_an_error(tiny_lora):
    first = tiny_lora.trainable()
    tiny_lora.load_trainable({name: array + 0.05 for name, array in tiny_lora.trainable().items()})
    before = tiny_lora.model(TOKENS)
    with pytest.raises(ZeroDivisionError), tiny_lora.holding(first):
        _ = 1 / 0
    assert mx.array_equal(tiny_lora.model(TOKENS), before)


# --- a worker with fewer bits ---------------------------------------------------------------------


def test_a_quantised_worker_takes_full_weights_as_if_it_had_loaded_them(tiny):
    moved = {name: array * 1.1 for name, array in tiny.trainable().items()}
    tiny.load_trainable(moved)
    tiny.quantize(4)
    expected = tiny.model(TOKENS)

    worker = load("tiny", dtype="float32")
    worker.quantize(4)
    worker.load_trainable(moved)
    assert any(isinstance(module, nn.QuantizedLinear) for module in worker.model.modules())
    np.testing.assert_allclose(np.array(worker.model(TOKENS)), np.array(expected), atol=1e-5)


def test_a_quantised_worker_takes_an_adapter(tiny_lora):
    moved = {name: array + 0.01 for name, array in tiny_lora.trainable().items()}
    tiny_lora.quantize(4)
    before = tiny_lora.model(TOKENS)
    tiny_lora.load_trainable(moved)
    assert not mx.array_equal(tiny_lora.model(TOKENS), before)


def test_quantised_experts_take_weights_too():
    # Expert layers are not nn.Linear; float values written into their packed integers would be noise.
    policy, twin = (random_policy("qwen3_moe", hidden_size=64, moe_intermediate_size=64) for _ in range(2))
    weights = {name: array * 1.1 for name, array in policy.trainable().items()}
    policy.load_trainable(weights)
    policy.quantize(4)
    twin.quantize(4)
    twin.load_trainable(weights)
    tokens = mx.array([[1, 2, 3]])
    np.testing.assert_allclose(np.array(twin.model(tokens)), np.array(policy.model(tokens)), atol=1e-5)


# --- text -----------------------------------------------------------------------------------------


def test_a_stop_string_of_multi_byte_characters_is_found_at_its_last_token(tiny):
    # The embedded tokenizer falls back to bytes: three for each of these characters.
    stop = "答案是这里"
    tokens = tiny.tokenizer.encode(f"12 {stop}", add_special_tokens=False)
    assert len(tokens) > len(stop) + 4
    ends = [tiny.ends_with_stop(tokens[: i + 1], (stop,)) for i in range(len(tokens))]
    assert ends == [False] * (len(tokens) - 1) + [True]


def test_the_stop_token_is_not_part_of_the_text(tiny):
    tokens = tiny.tokenizer.encode("12", add_special_tokens=False)
    assert tiny.decode([*tokens, *tiny.stop_tokens]) == tiny.decode(tokens) == "12"
    assert tiny.decode([]) == ""


def test_a_tokenizer_that_may_come_later_is_the_same_and_reports_its_error_at_its_first_use(tiny, folder):
    later = load_policy(ModelConfig(model_name=str(folder)), seed=0, tokenizer_later=True)
    assert later.identity.mismatch(tiny.identity) is None
    assert later.stop_tokens == tiny.stop_tokens
    (folder / "tokenizer.json").write_text("{")
    later = load_policy(ModelConfig(model_name=str(folder)), seed=0, tokenizer_later=True)
    for _ in range(2):
        with pytest.raises(ModelError, match=f"{folder.name}.*cannot be loaded"):
            later.chat.encode([])


def test_garbage_is_collected_again_after_a_tokenizer_was_read(tiny):
    assert tiny.tokenizer
    assert gc.isenabled()


# --- identity -------------------------------------------------------------------------------------


def test_the_adapter_is_not_part_of_the_identity(tiny, tiny_lora):
    assert tiny.identity.mismatch(tiny_lora.identity) is None


def test_another_fine_tune_of_the_same_model_has_another_identity(tiny):
    other = load("tiny", dtype="float32")
    other.load_trainable({name: array * 1.001 for name, array in other.trainable().items()})
    assert "weights" in (tiny.identity.mismatch(other.identity) or "")


def test_the_vocabulary_is_part_of_the_identity_and_the_order_in_which_it_is_listed_is_not(tiny):
    def digest(vocabulary):
        return identify("name", "llama", excerpts_of(tiny.model), vocabulary).tokenizer

    given = digest({"a": 0, "b": 1, "c": 3})
    assert digest({"c": 3, "a": 0, "b": 1}) == given
    others = ({"b": 0, "a": 1, "c": 3}, {"a": 0, "b": 1, "c": 2}, {"a": 0, "bc": 3})
    assert given not in map(digest, others)


def test_weights_that_do_not_fit_replace_nothing(tiny):
    held = tiny.trainable()
    name, other = sorted(held)[:2]
    zeros = {each: mx.zeros_like(array) for each, array in held.items()}
    with pytest.raises(ModelError, match=f"'{name}' is on one side only"):
        tiny.load_trainable({each: array for each, array in zeros.items() if each != name})
    with pytest.raises(ModelError, match=rf"{name} has shape .*, got \(1,\)"):
        tiny.load_trainable(zeros | {name: mx.zeros((1,))})
    assert mx.array_equal(tiny.trainable()[other], held[other])
    assert mx.any(held[other] != 0)
    tiny.load_trainable(zeros)
    assert not mx.any(tiny.trainable()[other] != 0)
