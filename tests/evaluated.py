"""Settings of a run whose checkpoints the tests score."""

from grpo_actors.config import Config


def config(**sections) -> Config:
    """Return the settings of a short evaluation of the embedded model; `sections` replace whole sections."""
    return Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "data": {"task": "arithmetic"},
            "rollout": {"max_new_tokens": 40},
            "evaluator": {"eval_subset_size": 16, "eval_sampled": True},
        }
        | sections
    )
