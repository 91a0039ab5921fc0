"""The settings of a run whose checkpoints the tests have scored."""

from grpo_actors.config import Config


def config(**sections) -> Config:
    """A short evaluation of the embedded model; `sections` replace whole ones."""
    return Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "data": {"task": "arithmetic"},
            "rollout": {"max_new_tokens": 40},
            "evaluator": {"eval_subset_size": 16, "eval_sampled": True},
        }
        | sections
    )
