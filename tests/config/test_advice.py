"""Which settings have an effect follows from the others."""

import pytest

from grpo_actors.config import load_config
from grpo_actors.config.advice import without_effect

LORA = {f"model.lora_{leaf}" for leaf in ("rank", "scale", "dropout", "layers", "keys")}
BETAS = {"learner.adam_beta1", "learner.adam_beta2"}
REPLACING = {"selection.refill_limit", "selection.oversampling"}
TCP = {f"transport.{leaf}" for leaf in ("host", "port", "keys_dir", "insecure", "events_text")}
DATASET = {
    f"data.{leaf}"
    for leaf in (
        "subset",
        "split",
        "eval_split",
        "revision",
        "prompt_column",
        "answer_column",
        "eval_fraction",
    )
}
GYM = {f"data.gym_{leaf}" for leaf in ("task", "settings", "size", "eval_size")}
CODE = {f"reward.{leaf}" for leaf in ("allow_code_execution", "code_timeout_s", "code_memory_gb")}
REFERENCE = {"objective.kl_estimator", "objective.reference_refresh_updates", "health.max_kl"}
REFRESH = {"objective.reference_refresh_alpha"}
SAPO = {"objective.sapo_tau_positive", "objective.sapo_tau_negative"}
CAP, FLOOR = {"objective.correction_cap"}, {"objective.correction_floor"}
OTHER_LOSSES = {"objective.clip_delta", "objective.dual_clip", "objective.cispo_cap"} | SAPO
#: Settings without effect among the defaults.
UNUSED = (
    LORA
    | {"rollout.rollout_bits", "selection.curriculum_floor", "evaluator.eval_temperature"}
    | {"learner.divide_model", "learner.divide_gradient"}
    | REPLACING
    | TCP
    | DATASET
    | GYM
    | CODE
    | REFERENCE
    | REFRESH
    | OTHER_LOSSES
    | CAP
    | FLOOR
)


@pytest.mark.parametrize(
    ("overrides", "gain", "lose"),
    [
        ([], set(), set()),
        (["fine_tune_type=lora"], LORA, set()),
        (["quantize_for_rollouts=true"], {"rollout.rollout_bits"} | CAP, set()),
        (
            ["quantize_for_rollouts=true", "fine_tune_type=lora", "base_bits=4"],
            {"rollout.rollout_bits"} | CAP | LORA,
            {"rollout.quantize_for_rollouts"},
        ),
        (["optimizer=lion"], set(), BETAS),
        (["optimizer=adafactor"], set(), BETAS),
        (["optimizer=adam"], set(), set()),
        (["dynamic_sampling=true"], REPLACING, set()),
        (["min_success=0.5"], REPLACING, set()),
        (["max_success=0.5"], REPLACING, set()),
        (["curriculum=true"], {"selection.curriculum_floor"}, set()),
        (["kl_coeff=0.1"], REFERENCE, set()),
        (["kl_coeff=0.1", "reference_refresh_updates=1"], REFERENCE | REFRESH, set()),
        (["ratio=recomputed", "correction=token_truncate"], CAP, set()),
        (["ratio=recomputed", "correction=token_mask"], CAP | FLOOR, set()),
        (["loss=sapo"], SAPO, {"objective.clip_eps", "objective.clip_eps_high"}),
        (["loss=two_sided"], {"objective.clip_delta"}, set()),
        (["loss=dual_clip"], {"objective.dual_clip"}, set()),
        (["loss=cispo"], {"objective.cispo_cap"}, set()),
        (["loss=cispo", "clip_eps_high=0.3"], {"objective.cispo_cap"}, {"objective.clip_eps"}),
        (
            ["loss=cispo", "cispo_cap=2"],
            {"objective.cispo_cap"},
            {"objective.clip_eps", "objective.clip_eps_high"},
        ),
        (["scheme=tcp"], TCP, set()),
        (["ranks=2"], {"learner.divide_model", "learner.divide_gradient"}, set()),
        (["workers=0"], set(), {"rollout.rollout_devices"}),
        (["eval_every_updates=0"], set(), {"evaluator.evaluator_device"}),
        (["eval_every_updates=1"], set(), set()),
        (["eval_sampled=true"], {"evaluator.eval_temperature"}, set()),
        (["task=dataset", "path=x"], DATASET, set()),
        (["task=dataset", "path=x", "eval_path=y"], DATASET - {"data.eval_fraction"}, set()),
        (["task=dataset", "path=x", "eval_split=y"], DATASET - {"data.eval_fraction"}, set()),
        (["task=reasoning_gym", "gym_task=x"], GYM, set()),
        (["functions={code_tests=1}", "allow_code_execution=true"], CODE, set()),
    ],
)
def test_a_setting_gives_others_their_effect_or_takes_it(overrides, gain, lose):
    assert without_effect(load_config(None, overrides).config).keys() == UNUSED - gain | lose


@pytest.mark.parametrize(
    "override", ["ratio=recorded", "clip_eps_high=0.2", "clip_eps_high=0.3", "quantize_for_rollouts=true"]
)
def test_what_is_no_mistake_gets_no_remark(override):
    assert load_config(None, [override]).notes == []


def test_a_higher_clip_below_the_lower_one_is_only_noted_where_it_is_read():
    notes = load_config(None, ["loss=sapo", "clip_eps_high=0.1"]).notes
    assert notes == ['objective.clip_eps_high has no effect: loss is "sapo"']
