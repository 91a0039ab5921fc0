"""An algorithm's name stands for several settings; what the user sets by hand wins."""

import pytest

from grpo_actors.config import OWNER, SECTIONS, load_config
from grpo_actors.config.objective import LOSSES, PRESETS
from grpo_actors.config.show import as_text
from grpo_actors.errors import ConfigError


def value(loaded, leaf):
    return getattr(getattr(loaded.config, OWNER[leaf]), leaf)


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_preset_sets_exactly_its_settings_and_says_so(algorithm):
    loaded, plain = load_config(None, [f"algorithm={algorithm}"]), load_config(None)
    for leaf, section in OWNER.items():
        expected = algorithm if leaf == "algorithm" else PRESETS[algorithm].get(leaf, value(plain, leaf))
        assert value(loaded, leaf) == expected, leaf
        origin = loaded.origins[f"{section}.{leaf}"]
        assert (origin == f'algorithm "{algorithm}"') == (leaf in PRESETS[algorithm]), leaf
    assert loaded.notes == []


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_preset_names_every_number_that_its_loss_reads(algorithm):
    # Otherwise clip_eps_high = 0.28 in a file, meant for another loss, would become part of "the paper's" loss.
    preset = PRESETS[algorithm]
    assert LOSSES[preset["loss"]].reads <= preset.keys()


def test_every_algorithm_that_the_configuration_allows_has_a_preset():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["algorithm=grop"])
    allowed = ", ".join(f'"{name}"' for name in PRESETS)
    assert str(caught.value).startswith(f"--set: objective.algorithm must be one of {allowed}, got")
    assert 'did you mean "grpo"?' in str(caught.value)


def test_a_setting_by_hand_beats_the_preset_of_its_own_source_whatever_their_order():
    for overrides in (["clip_eps=0.1", "algorithm=gspo"], ["algorithm=gspo", "clip_eps=0.1"]):
        loaded = load_config(None, overrides)
        assert (value(loaded, "clip_eps"), value(loaded, "clip_eps_high")) == (0.1, 4e-4)
        assert loaded.origins["objective.clip_eps"] == "--set"


def test_a_later_source_decides_first_by_hand_then_by_its_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('algorithm = "dapo"\noverlong_tokens = 8\nclip_eps_high = 0.5\n')
    assert value(load_config("mine.toml"), "clip_eps_high") == 0.5
    assert value(load_config("mine.toml"), "dynamic_sampling") is True
    assert value(load_config("mine.toml", ["clip_eps_high=0.4"]), "clip_eps_high") == 0.4
    other = load_config("mine.toml", ["algorithm=gspo"])
    # The clip of gspo and nothing of dapo; the other settings of the file stay.
    assert value(other, "clip_eps_high") == 4e-4
    assert value(other, "dynamic_sampling") is False
    assert value(other, "overlong_tokens") == 8


def test_a_contradiction_of_a_preset_is_blamed_on_what_was_set_by_hand():
    with pytest.raises(
        ConfigError, match=r"^--set: objective\.clip_delta must be > 1 \+ clip_eps_high = 4\.5"
    ):
        load_config(None, ["algorithm=intellect2", "clip_eps_high=3.5"])


def test_a_quantised_rollout_recomputes_the_ratio_and_corrects_it_by_default():
    loaded = load_config(None, ["quantize_for_rollouts=true"])
    assert (value(loaded, "ratio"), value(loaded, "correction")) == ("recomputed", "token_truncate")
    assert loaded.origins["objective.ratio"] == "quantize_for_rollouts"
    masked = load_config(None, ["quantize_for_rollouts=true", "correction=token_mask"])
    assert (value(masked, "ratio"), value(masked, "correction")) == ("recomputed", "token_mask")
    areal = load_config(None, ["quantize_for_rollouts=true", "algorithm=areal"])
    assert value(areal, "correction") == "token_mask", "an algorithm has its own"
    for quantised in ("quantize_for_rollouts=true", "kv_bits=8"):
        recorded = load_config(None, [quantised, "ratio=recorded", "correction=none"])
        assert any(note.startswith('objective.ratio = "recorded"') for note in recorded.notes)
    cache = load_config(None, ["kv_bits=4"])
    assert (value(cache, "ratio"), value(cache, "correction")) == ("recomputed", "token_truncate")
    assert cache.origins["objective.ratio"] == "kv_bits"
    assert value(load_config(None, ["kv_bits=0"]), "ratio") == "recorded"


def test_a_dry_run_shows_what_the_algorithm_set(tmp_path):
    shown = as_text(load_config(None, ["algorithm=gspo"]))
    (line,) = [line for line in shown.splitlines() if line.startswith("clip_eps_high")]
    assert 'algorithm "gspo"' in line
    stored = tmp_path / "shown.toml"
    stored.write_text(shown)
    assert load_config(stored).config == load_config(None, ["algorithm=gspo"]).config


def test_numbers_that_are_not_set_follow_others():
    numbers = load_config(None, ["clip_eps=0.3"]).config.objective.numbers
    assert (numbers["clip_eps_high"], numbers["cispo_cap"]) == (0.3, 1.3)
    assert numbers.keys() == SECTIONS["objective"].model_fields.keys()


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["loss=sapo", "clip_eps=0.1"], 'objective.clip_eps has no effect: loss is "sapo"'),
        (["clip_delta=5"], 'objective.clip_delta has no effect: loss is "clip"'),
        (["loss=cispo", "cispo_cap=2", "clip_eps=0.1"], 'objective.clip_eps has no effect: loss is "cispo"'),
        (["max_kl=2"], "health.max_kl has no effect: kl_coeff is 0: no KL is measured"),
        (["kl_estimator=k1"], "objective.kl_estimator has no effect: kl_coeff is 0"),
        (
            ["kl_coeff=0.1", "reference_refresh_alpha=0.5"],
            "objective.reference_refresh_alpha has no effect: reference_refresh_updates is 0",
        ),
        (["correction_cap=2"], 'objective.correction_cap has no effect: correction is "none"'),
        (
            ["ratio=recomputed", "correction=token_truncate", "correction_floor=0.5"],
            'objective.correction_floor has no effect: correction is "token_truncate"',
        ),
        (["oversampling=2"], "selection.oversampling has no effect: no group is ever replaced"),
        (["rollout_bits=8"], "rollout.rollout_bits has no effect: quantize_for_rollouts is false"),
        (
            ["fine_tune_type=lora", "base_bits=4", "quantize_for_rollouts=true"],
            "rollout.quantize_for_rollouts has no effect: base_bits has quantised the model already",
        ),
        (["optimizer=lion", "adam_beta2=0.9"], 'learner.adam_beta2 has no effect: optimizer is "lion"'),
    ],
)
def test_a_number_that_nothing_reads_is_noted(overrides, note):
    assert load_config(None, overrides).notes == [note]


# The cap is 1 + clip_eps_high where it is not set, and that is clip_eps where it is not set.
@pytest.mark.parametrize("number", ["clip_eps_high=0.4", "clip_eps=0.1"])
def test_a_number_that_another_follows_has_an_effect(number):
    assert load_config(None, ["loss=cispo", number]).notes == []
