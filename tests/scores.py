"""Scores, reports and their measure, for tests of what compares, keeps or shows them."""

from grpo_actors.score import Measure, Report, Score

MEASURE = Measure(metric="accuracy", problems=10, digest="d", temperature=0.0, max_new_tokens=64)


def score(value: float, **measure) -> Score:
    """Return a score with the interval value ± 0.1; `measure` changes fields of `MEASURE`."""
    return Score(value=value, low=value - 0.1, high=value + 0.1, measure=MEASURE.model_copy(update=measure))


def report(value: float = 0.5, *, accuracy: float = 0.5, gain=None, **measure) -> Report:
    """Return a report with that score."""
    return Report(
        score=score(value, **measure),
        gain=gain,
        accuracy=accuracy,
        accuracy_low=0.0,
        accuracy_high=1.0,
        reward=1.0,
        sampled_accuracy=None,
        sampled_reward=None,
        rewards={"correctness": accuracy},
        completion_length_mean=3.0,
        truncated_share=0.0,
        seconds=1.0,
    )
