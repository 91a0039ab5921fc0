"""A nanochat model, converted, trained and reloaded by the real commands."""

import json
from pathlib import Path

import mlx_lm
import pytest
from commands import run_here
from nanochat_files import Tiny, write
from runs import new_run

from grpo_actors.convert.__main__ import main as convert

#: Random weights answer nothing, but some completions are shorter than others: a signal to learn from.
OWN_REWARD = """
def short(prompts, completions, answer, **columns):
    return [1.0 / (1 + len(chat[-1]["content"])) for chat in completions]
"""


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_converted_model_trains_on_arithmetic_and_its_checkpoint_is_a_model_folder(tmp_path, kind):
    source = write(tmp_path / "source", Tiny())
    folder = tmp_path / "model"
    assert run_here(convert, "--nanochat", source, "--output-dir", folder).returncode == 0
    settings = {
        "model_name": str(folder),
        "fine_tune_type": kind,
        "learning_rate": 1e-3,
        "max_updates": 2,
        "max_staleness": 0,
        "eval_every_updates": 0,
        "workers": 0,
    }
    with new_run(**settings) as run:
        (run.folder.parent / "own.py").write_text(OWN_REWARD)
        assert run.run("--set", 'reward.functions={"own.py:short"=1.0}') == 0, run.stderr
        metrics = run.records("metrics")
        assert len(metrics) == 2
        assert all(record["grad_norm"] > 0 for record in metrics)
        # Versions 0 to 2, each with different weights.
        assert len({record["digest"] for record in run.records("policy")}) == 3
        # Sampling decodes with a cache, training shares prompts: a lost cap or a wrong position shows here.
        assert all(record["logprob_gap_max"] < 1e-3 for record in metrics)
        assert_usable(run.folder / "checkpoint-2", folder, kind)


def assert_usable(checkpoint: Path, base: Path, kind: str) -> None:
    """Assert that mlx_lm.load reads the checkpoint, with tokenizer, stop tokens and chat template."""
    if kind == "full":
        _, tokenizer = mlx_lm.load(str(checkpoint))
    else:
        _, tokenizer = mlx_lm.load(str(base), adapter_path=str(checkpoint))
    ids = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_ids == set(ids)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "12?"}], add_generation_prompt=True)
    assert prompt == mlx_lm.load(str(base))[1].apply_chat_template(
        [{"role": "user", "content": "12?"}], add_generation_prompt=True
    )
