"""The text of a completion that is judged."""

from thinking_model import write_thinking_model

from grpo_actors.config import ModelConfig
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.judged import judged_text
from grpo_actors.policy.model import load_policy
from grpo_actors.tasks.task import Problem


def test_of_several_turns_the_last_one_is_judged_by_how_it_begins(tmp_path):
    folder = write_thinking_model(tmp_path / "model")
    policy = load_policy(ModelConfig(model_name=str(folder), dtype="float32"), seed=0)

    def ids(text):
        return policy.tokenizer.encode(text, add_special_tokens=False)

    first, reply, last = ids("1</think>2"), ids("more?"), ids("3 4")
    for opening in ([], ids("<think>")):  # of the last turn; that of the first one is in the prompt
        inserted = [*reply, *opening]
        tokens = [*first, *inserted, *last]
        spans = [len(first), len(first) + len(inserted)]
        zeros = [0] * len(tokens)
        completion = SampledCompletion(tokens, [0.0] * len(tokens), zeros, True, {}, inserted=spans)
        prompt = [] if opening else ids("?<think>")
        group = SampledGroup(0, 0, Problem("p", (), ""), [5, *prompt], "w", [completion])
        # Thinking that never ends leaves nothing to judge.
        assert judged_text(policy, "after_think", group, completion) == ("" if opening else "3 4")
        assert judged_text(policy, "all", group, completion) == "3 4"
