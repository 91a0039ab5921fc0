"""Problems, environments and the sampler together: chats from tokens, rewards of turns, and failures, which train nothing."""

from pathlib import Path

from bounds import HANG_S

from grpo_actors.config import Config
from grpo_actors.evaluator.score import evaluate, held_out
from grpo_actors.learner.exchange.supply import oldest_version
from grpo_actors.learner.groups import SampledCompletion
from grpo_actors.policy.decoding.draw import Sample
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.thinking import Tags, Thinking
from grpo_actors.rollout.episodes import Episodes, chat_of, judged, open_episodes
from grpo_actors.rollout.results import problem_of, score_group
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.rewards import REWARDS
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.wire.messages import Lease, ints, read_floats

OWN = Path(__file__).parents[1] / "tasks" / "own_environments.py"
PARAMS = SamplingParams(120)
SEEDS = list(range(8))


def lease_of(policy, **columns):
    question = {"role": "user", "content": "There are 21 pears and 14 plums. How many are there in all?"}
    fields = {
        "lease": 3,
        "attempt": 1,
        "token": 7,
        "min_version": 0,
        "problem_id": "p3",
        "seeds": SEEDS,
        "messages": [question],
    }
    prompt = ints(policy.chat.encode([question]))
    columns_json = '{"topic": "fruit"}'
    return Lease.model_validate(
        fields | {"prompt": prompt, "answer": "35", "columns": columns_json} | columns
    )


def sampled(policy, environment, max_turns=8, timeout_s=HANG_S, params=PARAMS):
    """Sample one lease with an environment of the tests."""
    lease = lease_of(policy)
    with Replier(f"{OWN}:{environment}", timeout_s=timeout_s) as replier:
        respond = Episodes({"": replier}, policy, max_turns).of(problem_of(lease))
        prompt = policy.chat.encode(lease.messages)
        [samples] = sample_groups(policy, [prompt], [SEEDS], params, responds=[respond])
    return lease, samples


def test_the_chat_of_a_completion_is_what_the_environment_received_and_replied(tiny):
    _, samples = sampled(tiny, "asks_twice")
    asked_twice = [sample for sample in samples if len(sample.spans) == 4]
    assert len(asked_twice) >= 4
    for sample in asked_twice:
        first, reply, second, other, last = chat_of(tiny, sample)
        assert [turn["role"] for turn in (first, second, last)] == ["assistant"] * 3
        assert reply == {"role": "user", "content": f"Once more, fruit 35: {first['content']}"}
        assert other == {"role": "user", "content": f"Once more, fruit 35: {second['content']}"}
        # The tokens hold all of it, as the template writes it.
        parts = [first, "<|user|>", reply, "<|assistant|>", second, "<|user|>", other, "<|assistant|>", last]
        text = "".join(part if isinstance(part, str) else part["content"] + "<|end|>" for part in parts)
        text = text.replace("<|end|><|end|>", "<|end|>").replace("<|user|><|end|>", "<|user|>")
        assert tiny.decode(sample.tokens) == text.removesuffix("<|end|>")


def test_a_reply_that_did_not_fit_is_no_turn(tiny):
    """The policy never read it."""
    first, second = ([*tiny.tokenizer.encode(text)] for text in ("21", "14"))
    replies = [{"role": "user", "content": text} for text in ("once more", "and again")]
    sample = Sample([*first, 5, 6, *second], spans=[len(first), len(first) + 2], replies=replies)
    assert chat_of(tiny, sample) == [
        {"role": "assistant", "content": tiny.decode(first)},
        replies[0],
        {"role": "assistant", "content": tiny.decode(second)},
    ]


def test_whether_a_turn_begins_with_thinking_is_said_by_the_tokens_before_it(tiny):
    opening, closing = (tiny.tokenizer.encode(tag) for tag in ("<reasoning>", "</reasoning>"))
    tiny.thinking = Thinking(Tags("<reasoning>", "</reasoning>"), tuple(opening), tuple(closing))
    turn = [*tiny.tokenizer.encode("7 + 7"), *closing, *tiny.tokenizer.encode("14")]
    sample = Sample(turn)
    chat, thoughts = judged(tiny, opening, sample, "after_think")
    assert (chat[-1]["content"], thoughts) == ("14", "7 + 7")
    # Of a later turn the prompt says nothing.
    first, reply = tiny.tokenizer.encode("1"), tiny.tokenizer.encode("2")
    later = Sample([*first, *reply, *opening, *turn], replies=[{"role": "user", "content": "2"}])
    later.spans = [len(first), len(first) + len(reply) + len(opening)]
    chat, thoughts = judged(tiny, first, later, "after_think")
    assert ([turn["content"] for turn in chat], thoughts) == (["1", "2", "14"], "7 + 7")


def test_the_number_of_turns_is_bounded(tiny):
    _, samples = sampled(tiny, "asks_twice", max_turns=2)
    assert max(len(sample.spans) // 2 for sample in samples) == 1
    assert all(sample.finished for sample in samples if len(sample.tokens) < PARAMS.max_new_tokens - 40)


def test_rewards_see_all_turns_and_the_built_in_ones_judge_the_last(tiny, monkeypatch):
    lease, samples = sampled(tiny, "asks_twice", max_turns=2)
    seen = []

    def watch(completions, **_):
        seen.extend(completions)
        return [0.0] * len(completions)

    monkeypatch.setitem(REWARDS, "watch", watch)
    with Scorer({"watch": 1.0, "strict_format": 1.0}, timeout_s=HANG_S) as scorer:
        group = score_group(lease, samples, tiny, scorer, sampling_s=0.0)
        last_alone = scorer.score(problem_of(lease), [tiny.decode(sample.turn) for sample in samples])
    assert seen[: len(samples)] == [chat_of(tiny, sample) for sample in samples]
    strict = [completion.rewards["strict_format"] for completion in group.completions]
    assert strict == last_alone.rewards["strict_format"]
    assert 1.0 in strict


def test_rewards_judge_what_follows_the_thinking_or_all_of_it(tiny, monkeypatch):
    reasoning = [tiny.tokenizer.encode(tag) for tag in ("<reasoning>", "</reasoning>")]
    tiny.thinking = Thinking(Tags("<reasoning>", "</reasoning>"), *map(tuple, reasoning))
    lease = lease_of(tiny)
    [samples] = sample_groups(tiny, [tiny.chat.encode(lease.messages)], [SEEDS], SamplingParams(120))
    seen = []

    def watch(completions, thoughts, **_):
        seen.append(
            [(chat[-1]["content"], thought) for chat, thought in zip(completions, thoughts, strict=True)]
        )
        return [0.0] * len(completions)

    monkeypatch.setitem(REWARDS, "watch", watch)
    with Scorer({"watch": 1.0}, timeout_s=1) as scorer:
        for grade in ("after_think", "all"):
            score_group(lease, samples, tiny, scorer, sampling_s=0.0, grade=grade)
    texts = [tiny.decode(sample.tokens) for sample in samples]
    parts = [tiny.thinking.divide(text, opened=False) for text in texts]
    assert sum(bool(part.thoughts and "<answer>" in part.answer) for part in parts) >= 4
    assert seen[0] == [(part.answer, part.thoughts) for part in parts]
    assert seen[1] == [(text, part.thoughts) for text, part in zip(texts, parts, strict=True)]


def test_a_group_message_describes_its_turns(tiny):
    lease, samples = sampled(tiny, "asks_twice", max_turns=2)
    with Scorer({"correctness": 1.0}, timeout_s=HANG_S) as scorer:
        group = score_group(lease, samples, tiny, scorer, sampling_s=0.0)
    assert oldest_version(group) == 0
    for sample, completion in zip(samples, map(SampledCompletion.read, group.completions), strict=True):
        assert completion.inserted == sample.spans
        assert sum(completion.sampled) == sample.sampled
        assert completion.last_turn == sample.turn
        assert {p for p, s in zip(completion.logprobs, completion.sampled, strict=True) if not s} <= {0.0}


def test_an_environment_that_fails_ends_its_completion_which_gets_no_reward_and_leaves_the_others(tiny):
    lease, samples = sampled(tiny, "fails_on_long_turns")
    with Scorer({"correctness": 1.0, "integer": 0.5}, timeout_s=HANG_S) as scorer:
        group = score_group(lease, samples, tiny, scorer, sampling_s=0.0)
    failed = [sample.failure is not None for sample in samples]
    assert 0 < sum(failed) < len(failed)
    for completion, sample, bad in zip(group.completions, samples, failed, strict=True):
        assert bad == (not sample.spans)
        assert (None in completion.rewards.values()) == bad
        assert len(read_floats(completion.logprobs)) == len(sample.tokens)
    assert group.failures.keys() == {"environment"}
    assert group.failures["environment"].startswith("raised ValueError: an odd turn")


def test_an_environment_that_hangs_is_reported_and_the_sampler_continues(tiny):
    _, samples = sampled(tiny, "hangs", timeout_s=0.2, params=SamplingParams(40))
    ended = [sample for sample in samples if sample.finished]
    assert ended
    for sample in ended:
        assert "took more than 0.2 s" in sample.failure
        assert not sample.spans


def test_a_role_that_the_template_refuses_is_a_failure_of_the_environment(tiny):
    strict = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tiny.tokenizer.chat_template = (
        f"{strict}<|{{{{ m['role'] }}}}|>{{{{ m['content'] }}}}<|end|>{{% endfor %}}<|assistant|>"
    )
    _, samples = sampled(tiny, "takes_messages_alone")
    assert any("refuses a turn of role 'tool'" in (sample.failure or "") for sample in samples)


def test_an_evaluation_has_the_turns_of_the_run_and_judges_the_last(tiny):
    config = Config.model_validate(
        {
            "data": {"task": "arithmetic", "environment": f"{OWN}:fails_on_long_turns"},
            "rollout": {"max_new_tokens": 100},
            "evaluator": {"eval_subset_size": 16},
        }
    )
    task = load_task(config.data, seed=0)
    questions = held_out(task, config, tiny)
    with Scorer({"correctness": 1.0}, timeout_s=HANG_S) as scorer, open_episodes(config, tiny) as turns:
        one = evaluate(tiny, task, questions, config, scorer).report
        more = evaluate(tiny, task, questions, config, scorer, episodes=turns).report
    assert more.rewards["correctness"] == more.accuracy  # both of the last turn
    assert more.completion_length_mean > one.completion_length_mean


def test_settings_without_an_environment_have_no_episodes(tiny):
    with open_episodes(Config(), tiny) as turns:
        assert turns is None


def test_the_calculator_is_used_by_a_policy_that_calls_it(tiny):
    """Checks the environment's reply and the tokens of the next turn, with a call written in place of the policy's turn."""
    lease = lease_of(tiny)
    with Replier("calculator", timeout_s=HANG_S) as replier:
        respond = Episodes({"": replier}, tiny, 2).of(problem_of(lease))
        [[sample]] = sample_groups(tiny, [tiny.chat.encode(lease.messages)], [[1]], PARAMS)
        [end] = tiny.stop_tokens
        sample.tokens = [*tiny.tokenizer.encode("<tool>21+14</tool>", add_special_tokens=False), end]
        assert respond(sample) == tiny.tokenizer.encode(
            "<|user|>35<|end|><|assistant|>", add_special_tokens=False
        )
        assert sample.replies == [{"role": "user", "content": "35"}]
        assert respond(sample) is None  # at most two turns
