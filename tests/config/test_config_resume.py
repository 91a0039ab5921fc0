import pytest

from grpo_actors.config import MATTERS_FOR_RESUME, OWNER, differences, load_config, resume_conflicts


def config(*overrides):
    return load_config(None, overrides).config


def test_what_matters_for_resume_exists():
    assert {f"{section}.{leaf}" for leaf, section in OWNER.items()} >= MATTERS_FOR_RESUME


def test_differences_name_the_keys_in_the_schemas_order():
    assert differences(config(), config()) == []
    assert differences(config("workers=2", "seed=1"), config()) == ["run.seed", "rollout.workers"]


@pytest.mark.parametrize(
    "override",
    ["logging_steps=5", "workers=3", "workers=auto", "save_steps=1", "max_updates=9", "learning_rate=0.1"],
)
def test_a_run_may_resume_under_other_conditions(override):
    assert resume_conflicts(config(), config(override)) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "run.seed"),
        ("model_name=x", "model.model_name"),
        ("fine_tune_type=lora", "model.fine_tune_type"),
        ("optimizer=lion", "learner.optimizer"),
        ("shuffle=false", "data.shuffle"),
        ("num_generations=4", "rollout.num_generations"),
        ("gradient_accumulation_steps=2", "learner.gradient_accumulation_steps"),
    ],
)
def test_a_run_may_not_resume_with_other_data_or_another_model(override, key):
    assert resume_conflicts(config(), config(override)) == [key]


def test_a_quantised_base_is_another_base():
    adapter = "fine_tune_type=lora"
    assert resume_conflicts(config(adapter), config(adapter, "base_bits=4")) == ["model.base_bits"]


def test_an_update_may_be_cut_in_another_way():
    # 1 × 4 and 2 × 2 are both 4 groups
    assert resume_conflicts(config(), config("batch_size=2", "gradient_accumulation_steps=2")) == []


def test_the_data_of_a_source_may_move_but_nothing_else_of_it_may_change():
    def mixture(source):
        return config("functions={a=1}", f"sources=[{{ name = 'a', {source} }}]")

    saved = mixture("task = 'dataset', path = 'x', eval_path = 'y'")
    assert resume_conflicts(saved, mixture("task = 'dataset', path = 'z'")) == []
    assert resume_conflicts(saved, mixture("task = 'gsm8k', path = 'x'")) == ["data.sources"]


def test_an_update_of_another_size_is_another_one():
    # 1 × 4 and 2 × 4 groups
    assert resume_conflicts(config(), config("batch_size=2")) == ["learner.batch_size"]
