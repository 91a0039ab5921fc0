"""The text of a completion that is judged, as `reward.grade` says: what follows the thinking of the last turn, or all."""

from grpo_actors.config.data import Grade
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.policy.model import Policy


def judged_text(policy: Policy, grade: Grade, group: SampledGroup, completion: SampledCompletion) -> str:
    """Return the judged text of a completion of a group; `policy` has the tokenizer that sampled it."""
    text = policy.decode(completion.last_turn)
    if grade == "all":
        return text
    start, _ = completion.turn_bounds[-1]
    opened = policy.begins_thinking(completion.tokens[:start] or group.prompt)
    return policy.thinking.divide(text, opened=opened).answer
