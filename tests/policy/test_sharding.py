"""Which models can be divided among ranks, and that the parts of each compute what the whole computes."""

import importlib
import pkgutil
from pathlib import Path

import mlx_lm.models
import pytest
from mlx_lm.utils import MODEL_REMAPPING
from rank_groups import found_by_ranks

from grpo_actors.errors import ConfigError
from grpo_actors.policy.architectures import DIVISIBLE, DIVISIBLE_TO_TRAIN, require_divisible

#: Families that need other packages, or a GPU.
NOT_HERE = {"muse_spark", "prism_hadamard_qwen35"}
FAMILIES = sorted(DIVISIBLE - set(MODEL_REMAPPING) - NOT_HERE)
#: Of logits, in standard deviations, and of a gradient: float32 sums of some tens of terms in two layers.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def found():
    return found_by_ranks(Path(__file__).with_name("divided_families.py"), 2, *FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_what_one_computes(found, family):
    assert ("gradient" in found[family]) == (family in DIVISIBLE_TO_TRAIN)
    assert max(found[family].values()) < ROUNDING


@pytest.mark.slow
def test_the_list_of_models_that_can_be_divided_is_that_of_mlx_lm():
    found = set()
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            module = importlib.import_module(f"mlx_lm.models.{info.name}")
        except (ImportError, SystemExit):  # needs a package that is not here
            continue
        if hasattr(getattr(module, "Model", None), "shard"):
            found.add(info.name)
    found |= {name for name, module in MODEL_REMAPPING.items() if module in found}
    assert found - DIVISIBLE == {"kimi_k3"}
    assert found >= DIVISIBLE


@pytest.mark.parametrize(
    ("architecture", "ranks", "rule"),
    [
        ({"model_type": "mamba"}, 2, "must be 1 for m: mlx-lm cannot divide a mamba, got 2"),
        ({"model_type": "llama", "num_attention_heads": 6}, 4, "must divide the 6 heads of m, got 4"),
        (
            {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 2},
            4,
            "must divide the 2 key-value heads of m, got 4",
        ),
        (
            {"model_type": "qwen3_5", "text_config": {"num_attention_heads": 9}},
            2,
            "must divide the 9 heads of m, got 2",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(architecture, ranks, rule):
    require_divisible("m", architecture, 1, "rollout.rollout_ranks")
    with pytest.raises(ConfigError) as refused:
        require_divisible("m", architecture, ranks, "rollout.rollout_ranks")
    assert str(refused.value) == f"rollout.rollout_ranks: {rule}"


def test_some_models_can_be_divided_for_sampling_only():
    fitting = {"num_attention_heads": 8, "num_key_value_heads": 4}
    require_divisible("m", {"model_type": "llama", **fitting}, 4, "ranks", trains=True)
    sampled = {"model_type": "deepseek_v3", **fitting}
    require_divisible("m", sampled, 4, "ranks")
    with pytest.raises(ConfigError, match=r"ranks: must be 1 for m: the gradients of a deepseek_v3 .* got 4"):
        require_divisible("m", sampled, 4, "ranks", trains=True)
