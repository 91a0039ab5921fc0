import tomllib
from pathlib import Path

import pytest

from grpo_actors.config import OWNER, Config, load_config
from grpo_actors.config.show import as_text

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def test_the_promised_files_are_there():
    assert {file.name for file in FILES} >= {
        "quickstart.toml",
        "smoke_test.toml",
        "prod.toml",
        "smollm2.toml",
        # The names from MLX-GRPO, in addition to prod and smoke_test.
        "medium.toml",
        "ultra_light.toml",
        "nanochat_test.toml",
        "nanochat_grpo.toml",
        "nanochat_d32.toml",
        "nanochat_d32_test.toml",
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_shipped_file_passes_a_dry_run_without_a_note(file):
    loaded = load_config(file)
    assert as_text(loaded)
    assert loaded.notes == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_shipped_file_holds_only_what_differs_from_the_defaults(file):
    default = Config()
    for section, values in tomllib.loads(file.read_text()).items():
        for leaf, value in values.items():
            assert OWNER[leaf] == section
            assert value != getattr(getattr(default, section), leaf), f"{section}.{leaf}"


def test_the_quickstart_is_the_run_that_was_tuned():
    config = load_config("quickstart.toml").config
    assert (config.model.model_name, config.data.task) == ("tiny", "arithmetic")
    assert (config.groups_per_update, config.rollout.num_generations, config.rollout.max_new_tokens) == (
        8,
        8,
        40,
    )
    assert (config.rollout.workers, config.rollout.max_staleness, config.rollout.batch_groups) == (1, 1, 8)
    assert (config.learner.learning_rate, config.learner.adam_beta2, config.learner.max_grad_norm) == (
        2e-4,
        0.95,
        1.0,
    )
    assert (config.objective.clip_eps, config.objective.clip_eps_high) == (0.2, 0.28)
    # Five updates of warm-up, whether the learner rounds or truncates: 110 × 0.0455 = 5.005
    assert int(config.learner.max_updates * config.learner.warmup_ratio) == 5
    assert round(config.learner.max_updates * config.learner.warmup_ratio) == 5
