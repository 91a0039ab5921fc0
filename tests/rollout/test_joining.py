"""A worker loads what the learner's Welcome describes."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from mlx import nn

from grpo_actors.config import Config, DataConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.rollout.joining import load_welcome_policy, preload_policy
from grpo_actors.rollout.worker import warm_up
from grpo_actors.wire.messages import Welcome


def welcome(config, identity):
    return Welcome(
        run_id="r",
        config=config.model_dump_json(),
        identity=json.dumps(asdict(identity)),
        weights_endpoint="ipc:///nowhere",
        beat_s=1.0,
    )


def config(*, rollout=None, **model):
    return Config.model_validate({"model": {"dtype": "float32"} | model, "rollout": rollout or {}})


def bits_of(policy):
    return {module.bits for module in policy.model.modules() if isinstance(module, nn.QuantizedLinear)}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_worker_samples_with_as_many_bits_as_the_settings_say(bits):
    settings = config(rollout={"quantize_for_rollouts": True, "rollout_bits": bits})
    identity = load_policy(settings.model, seed=0).identity
    assert bits_of(load_welcome_policy(welcome(settings, identity), settings)) == {bits}


def test_a_workers_quantised_base_must_be_the_learners():
    settings = config(fine_tune_type="dora", base_bits=4)
    identity = load_policy(settings.model, seed=0).identity
    assert bits_of(load_welcome_policy(welcome(settings, identity), settings)) == {4}
    with pytest.raises(ModelError, match="weights is"):
        load_welcome_policy(welcome(settings, replace(identity, weights="0" * 16)), settings)


def test_a_worker_keeps_the_model_that_it_loaded_early_only_if_it_is_the_learners(tmp_path):
    settings, others = config(), config(fine_tune_type="dora")
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    prepared = []
    early = preload_policy(tmp_path / "config.json", lambda policy, config: prepared.append((policy, config)))
    assert prepared == [(early, settings)]
    assert load_welcome_policy(welcome(settings, early.identity), settings, early) is early
    loaded = load_welcome_policy(welcome(others, early.identity), others, early)
    assert loaded.config == others.model


def test_code_of_a_model_is_not_run_early_without_consent(tmp_path):
    (tmp_path / "config.json").write_text(config(trust_remote_code=True).model_dump_json())

    def early(allowed):
        return preload_policy(tmp_path / "config.json", lambda *_: None, allowed)

    assert early([]) is None
    assert early(["trust_remote_code"]) is not None


def test_a_worker_has_the_chat_template_of_the_settings():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ end }}"
    settings = config().model_copy(
        update={"data": DataConfig(chat_template=template, chat_template_kwargs={"end": "!"})}
    )
    identity = load_policy(settings.model, seed=0).identity
    policy = load_welcome_policy(welcome(settings, identity), settings)
    assert policy.decode(policy.chat.encode([{"role": "user", "content": "2+2?"}])) == "2+2?!"


def test_a_model_that_cannot_be_loaded_early_is_left_to_the_learner_to_report(tmp_path):
    def early():
        return preload_policy(tmp_path / "config.json", warm_up)

    assert early() is None
    (tmp_path / "config.json").write_text(config(model_name=str(tmp_path)).model_dump_json())
    assert early() is None
    # The tokenizer is read beside the weights, which are whole.
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    (tmp_path / "config.json").write_text(config(model_name=str(folder)).model_dump_json())
    assert early() is None
