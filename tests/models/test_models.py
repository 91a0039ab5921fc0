"""Tiny random models of other architectures train through real processes; `make test-models` prints the figures."""

import pytest
from architectures import families
from train_models import KINDS, NOT_BUILT, is_right, train

#: One whose ragged prompts are sampled apart, a sliding window and keys shared by a cache, experts.
QUICK = [("gemma2", "full"), ("gemma3n", "full"), ("mixtral", "lora")]
#: What a refusal says.
REFUSED = {
    "bitnet": "No Metal back-end",
    "deepseek_v41": "deepseek_v41 fails",
    "muse_spark": "No Metal back-end",
    "phi3small": "ends the process",
    "plamo3": "nats between sampling and training",
    "recurrent_gemma": "cannot be loaded",
    "rwkv7": "is not finite",
}
REST = [
    (f, k)
    for f in families()
    for k in KINDS
    if (f, k) not in QUICK and f not in NOT_BUILT and f not in REFUSED
]


@pytest.mark.parametrize(
    ("family", "kind"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)]
)
def test_worker_learner_checkpoint_and_export_are_one_model(family, kind, tmp_path):
    row = train(family, kind, tmp_path)
    assert is_right(row), row
    assert row["apart"] == (family == "gemma2") or (family, kind) in REST


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_model_that_would_not_train_right_is_refused_by_one_line(family, tmp_path):
    row = train(family, "lora", tmp_path)
    assert row["exit"] == 2, row
    assert REFUSED[family] in row["refused"]
