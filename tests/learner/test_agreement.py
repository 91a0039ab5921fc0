"""Sampling and training give the same log-probs, or the run does not start."""

import mlx.core as mx
import pytest
from architectures import random_policy
from hand_made import config, learner
from mlx import nn

from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.learner.agreement import check_agreement, measure
from grpo_actors.policy.model import prepare_training

#: 40 tokens of a vocabulary of 64, more than the windows of the models have.
PROMPT = [(5 * i + 1) * i % 29 + 1 for i in range(40)]


class ShiftedRope(nn.Module):
    """A rotation that is off by one position, but only for a cache that has tokens already."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def __call__(self, x, offset=0):
        shift = offset + 1 if isinstance(offset, mx.array) or offset else offset
        return self.rope(x, offset=shift)


def grpo_of(family, *, kind="full", keys=(), dropout=0.0, temperature=1.0, dtype=mx.float32):
    model = {"fine_tune_type": kind, "lora_keys": keys, "lora_dropout": dropout}
    settings = config(model=model, temperature=temperature)
    policy = random_policy(family)
    policy.config = settings.model
    policy.model.set_dtype(dtype)
    prepare_training(policy, seed=0)
    return learner(settings, policy)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma3n", "gemma4_text", "nemotron_h", "olmo3"])
def test_the_two_ways_agree_to_rounding(family, kind):
    grpo = grpo_of(family, kind=kind, keys=("self_attn.q_proj",) if family == "gemma3n" else ())
    note = check_agreement(grpo, PROMPT)
    assert (note is None) == (family != "nemotron_h"), "it computes ragged prompts differently"
    assert measure(grpo, PROMPT).largest <= 1e-4


@pytest.mark.parametrize(
    ("dropout", "version", "computed"), [(0.0, 0, True), (0.0, 1, True), (0.1, 0, True), (0.1, 1, False)]
)
def test_a_gradient_is_computed_unless_dropout_in_a_trained_adapter_changes_the_log_probs(
    dropout, version, computed
):
    grpo = grpo_of("nemotron_h", kind="lora", dropout=dropout)
    grpo.version = version
    assert (measure(grpo, PROMPT).gradient_norm is not None) == computed


@pytest.mark.skipif(
    mx.default_device().type == mx.DeviceType.gpu, reason="there it compiles the first update"
)
def test_the_gradient_of_a_known_architecture_costs_a_cpu_no_time():
    assert measure(grpo_of("llama"), PROMPT).gradient_norm is None


def test_a_prompt_of_one_token_can_be_checked():
    assert check_agreement(grpo_of("llama"), PROMPT[:1]) is None


def test_the_check_leaves_the_learner_as_it_was():
    grpo = grpo_of("olmo2", kind="lora")
    before = {name: mx.array(array) for name, array in grpo.policy.trainable().items()}
    check_agreement(grpo, PROMPT)
    after = grpo.policy.trainable()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert grpo.training.step(1.0) == (0.0, False)  # no gradient is left


@pytest.mark.parametrize("family", ["gemma2", "nemotron_h", "mamba"])
def test_a_model_that_computes_ragged_prompts_differently_samples_them_apart_and_says_so(family):
    note = check_agreement(grpo_of(family), PROMPT)
    assert note is not None
    assert "only prompts of equal length" in note
    assert f"mlx_lm.models.{family}" in note


@pytest.mark.parametrize(("temperature", "limit"), [(0.5, "0.02"), (1.0, "0.01"), (1.5, "0.01")])
def test_a_model_that_decodes_something_else_than_it_trains_is_refused(temperature, limit):
    grpo = grpo_of("llama", temperature=temperature)
    for layer in grpo.policy.model.layers:
        layer.self_attn.rope = ShiftedRope(layer.self_attn.rope)
    with pytest.raises(
        ModelError, match=rf"differ by .* nats between sampling and training \(at most {limit} is rounding\)"
    ):
        check_agreement(grpo, PROMPT)


def test_an_adapter_on_a_module_whose_weight_the_model_reads_itself_is_refused():
    with pytest.raises(
        ConfigError, match=r"lora_keys: .* an adapter does not fit \('LoRALinear' object has no attribute"
    ):
        grpo_of("gemma3n", kind="lora")


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ModelError, match=r"the gradient of mlx_lm.models.rwkv7 is not finite"):
        check_agreement(grpo_of("rwkv7"), PROMPT)


def test_a_model_that_fails_is_refused_by_its_module_and_error():
    grpo = grpo_of("olmo2")
    grpo.policy.model.layers[1].self_attn = None
    with pytest.raises(ModelError, match=r"mlx_lm.models.olmo2 fails: TypeError: 'NoneType'"):
        check_agreement(grpo, PROMPT)


def test_out_of_memory_is_no_fault_of_the_model():
    grpo = grpo_of("olmo2")

    def attention(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    grpo.policy.model.layers[1].self_attn = attention
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        check_agreement(grpo, PROMPT)


def test_half_precision_is_compared_by_its_mean():
    grpo = grpo_of("llama", dtype=mx.bfloat16)
    found = measure(grpo, PROMPT)
    assert check_agreement(grpo, PROMPT) is None

    def allow(nats):
        health = grpo.config.health.model_copy(update={"max_logprob_gap": nats})
        grpo.config = grpo.config.model_copy(update={"health": health})

    allow(found.mean)
    assert check_agreement(grpo, PROMPT) is None
    allow(found.mean / 2)
    with pytest.raises(ModelError, match="at most a mean of"):
        check_agreement(grpo, PROMPT)
