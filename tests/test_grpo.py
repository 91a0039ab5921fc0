"""The update on the embedded model, with groups made by hand: what the formulas say must show in the weights."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from grpo_actors.config import Config
from grpo_actors.errors import TrainingError
from grpo_actors.groups import SampledCompletion, SampledGroup
from grpo_actors.grpo import MAX_SKIPPED_IN_A_ROW, Grpo
from grpo_actors.objective.objective import Objective
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.sampling import SamplingParams, sample_groups
from grpo_actors.tasks.task import Problem

QUESTIONS = ["What is 12 + 34?", "7", "Tom has 21 apples and buys 3 bags of 14. How many has he?", "5 + 5?"]
REWARDS = [[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 3.0]]
MAX_NEW = 24


def config(*, model=None, run=None, temperature=1.0, **learner):
    return Config.model_validate(
        {
            "run": run or {},
            "model": {"dtype": "float32"} | (model or {}),
            "reward": {"functions": {"hand": 1.0}},
            "rollout": {"num_generations": 4, "max_new_tokens": MAX_NEW, "temperature": temperature},
            "learner": {
                "learning_rate": 1e-3,
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                "warmup_ratio": 0.0,
                "max_grad_norm": 0.0,
            }
            | learner,
        }
    )


def learner(settings, policy=None, *, total=10, reference=None, **objective):
    policy = policy or load_policy(settings.model, seed=settings.run.seed)
    chosen = Objective(
        aggregation=settings.learner.aggregation, kl_coeff=settings.learner.kl_coeff, **objective
    )
    return Grpo(settings, policy, reference, chosen, total)


def groups_of(policy, rewards=REWARDS, temperature=1.0, questions=QUESTIONS):
    """Really sampled by the policy; judged by hand."""
    prompts = [policy.encode_chat([{"role": "user", "content": text}]) for text in questions[: len(rewards)]]
    seeds = [[10 * i + k for k in range(len(row))] for i, row in enumerate(rewards)]
    sampled = sample_groups(policy, prompts, seeds, SamplingParams(MAX_NEW, temperature))
    return [
        SampledGroup(
            lease=i,
            epoch=0,
            problem=Problem(f"p{i}", ({"role": "user", "content": QUESTIONS[i]},), "46", {}),
            prompt=prompts[i],
            worker="w",
            completions=[
                SampledCompletion(
                    s.tokens,
                    s.logprobs,
                    [0] * len(s.tokens),
                    s.finished,
                    policy.decode(s.tokens),
                    {"hand": reward},
                )
                for s, reward in zip(samples, row, strict=True)
            ],
        )
        for i, (samples, row) in enumerate(zip(sampled, rewards, strict=True))
    ]


def weights(grpo):
    return {name: np.array(array) for name, array in grpo.policy.trainable().items()}


def assert_same_weights(a, b):
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def logprobs_under(policy, group, completion):
    values, _ = completion_logprobs(
        policy.model,
        mx.array([[*group.prompt, *completion.tokens]]),
        mx.array([len(group.prompt) - 1]),
        mx.array([completion.tokens]),
        1.0,
    )
    return np.array(values)[0]


def changed(groups, group, index, **changes):
    """The groups with one completion changed."""
    result = list(groups)
    completions = list(result[group].completions)
    completions[index] = replace(completions[index], **changes)
    result[group] = replace(result[group], completions=completions)
    return result


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_on_policy_the_loss_is_minus_the_mean_advantage(aggregation, temperature):
    grpo = learner(config(aggregation=aggregation, temperature=temperature))
    groups = groups_of(grpo.policy, temperature=temperature)
    told = grpo.update(groups)

    # π = π_old: r = 1 for every token, so that L_t = −A whatever the clip.
    R = np.array(REWARDS)
    A = (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    lengths = np.array([[len(c.tokens) for c in group.completions] for group in groups])
    expected = {
        "grpo": -A.mean(),
        "dapo": -(A * lengths).sum() / lengths.sum(),
        "dr_grpo": -(A * lengths).sum() / (A.size * MAX_NEW),
    }[aggregation]
    assert told["loss"] == pytest.approx(expected, abs=1e-5)
    assert told["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert told["clip_share"] == 0.0
    assert told["logprob_gap_max"] < 1e-4
    assert told["tokens"] == lengths.sum()
    assert told["reward_mean"] == pytest.approx(R.mean())
    assert told["staleness"] == {"0": 4}


@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(aggregation):
    # All rows of 33 to 64 tokens, and so padded to 64: MLX's kernels round otherwise at 32 tokens (by 3e-6).
    long_questions = [
        f"{name} has 21 apples and buys 3 bags of {n}. Now?"
        for n, name in enumerate(("Tom", "Ann", "Eve", "Bob"), 12)
    ]
    gradients, norms = [], []
    groups = None
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        settings = config(
            aggregation=aggregation,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            adam_beta1=0.0,  # the first moment is then the gradient itself
            kl_coeff=0.1,
        )
        grpo = learner(settings, reference=load_policy(settings.model, seed=0))
        groups = groups or groups_of(grpo.policy, questions=long_questions)
        norms.append(grpo.update(groups)["grad_norm"])
        state = tree_flatten(grpo.training.optimizer.state)
        gradients.append(np.concatenate([np.array(m).ravel() for name, m in state if name.endswith(".m")]))
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-6)
    for other in gradients[1:]:
        assert np.linalg.norm(other - gradients[0]) <= 1e-6 * np.linalg.norm(gradients[0])


def test_a_positive_advantage_makes_its_completion_likelier_and_a_negative_one_rarer():
    grpo = learner(config(learning_rate=1e-4))
    groups = groups_of(grpo.policy, REWARDS[:1])  # advantages of 1, 0, 0, 2 around 0.75: +, −, −, +
    group = groups[0]
    before = [logprobs_under(grpo.policy, group, c).sum() for c in group.completions]
    for _ in range(3):
        grpo.update(groups)
    after = [logprobs_under(grpo.policy, group, c).sum() for c in group.completions]
    assert after[3] > before[3]
    # A completion that is a beginning of a better one may rise with it: compare with the best.
    assert all(after[3] - before[3] > after[i] - before[i] for i in (1, 2))


def test_further_iterations_on_one_batch_meet_the_clip():
    groups = groups_of(learner(config()).policy)
    once = learner(config(num_iterations=1)).update(groups)
    often = learner(config(num_iterations=5, learning_rate=5e-3)).update(groups)
    assert once["clip_share"] == 0.0
    assert often["clip_share"] > 0.0
    assert often["ratio_max"] > 1.2
    assert often["logprob_gap_max"] < 1e-4, "the gap is that before the batch moved the policy"


def test_groups_of_equal_rewards_teach_nothing():
    grpo = learner(config(adam_beta1=0.0))
    before = weights(grpo)
    told = grpo.update(groups_of(grpo.policy, [[1.0] * 4, [0.0] * 4]))
    assert told["zero_variance_share"] == 1.0
    assert told["grad_norm"] == 0.0
    assert_same_weights(before, weights(grpo))


# --- the reference --------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_is_the_base_also_after_updates(tiny):
    grpo = learner(
        config(model={"fine_tune_type": "lora", "lora_rank": 4}, kl_coeff=0.05, learning_rate=1e-2)
    )
    groups = groups_of(grpo.policy)
    first = grpo.update(groups)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(2):
        grpo.update(groups)
    expected = []
    for group in groups:
        for completion in group.completions:
            base = logprobs_under(tiny, group, completion)
            with grpo.policy.adapter_off():
                off = logprobs_under(grpo.policy, group, completion)
            np.testing.assert_allclose(off, base, atol=1e-5)
            x = base - logprobs_under(grpo.policy, group, completion)
            expected += list(np.exp(x) - x - 1)  # k3
    assert np.mean(expected) > 1e-3
    assert grpo.update(groups)["kl"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_the_reference_of_a_full_fine_tune_stays_where_it_was():
    settings = config(kl_coeff=0.05, learning_rate=1e-3)
    reference = load_policy(settings.model, seed=0)
    grpo = learner(settings, reference=reference)
    before = {name: np.array(array) for name, array in reference.trainable().items()}
    groups = groups_of(grpo.policy)
    kls = [grpo.update(groups)["kl"] for _ in range(3)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[2] > kls[0]
    assert_same_weights(before, {name: np.array(array) for name, array in reference.trainable().items()})


# --- what must not reach the weights --------------------------------------------------------------


def test_a_log_prob_that_is_no_number_drops_the_step_and_is_counted():
    grpo = learner(config())
    groups = groups_of(grpo.policy)
    before = weights(grpo)
    told = grpo.update(changed(groups, 2, 0, logprobs=[math.nan] * len(groups[2].completions[0].tokens)))
    assert told["skipped_steps"] == 1
    assert_same_weights(before, weights(grpo))
    assert grpo.version == 1
    assert grpo.update(groups)["skipped_steps"] == 1, "the next good batch is a step"
    assert grpo.skipped_in_a_row == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_log_prob_ends_at_the_clamp_of_the_ratio(bad):
    grpo = learner(config())
    groups = groups_of(grpo.policy)
    grpo.update(changed(groups, 2, 0, logprobs=[bad] * len(groups[2].completions[0].tokens)))
    assert all(np.isfinite(array).all() for array in weights(grpo).values())


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e300])
def test_a_reward_that_is_no_number_leaves_its_completion_out(bad):
    grpo = learner(config())
    told = grpo.update(changed(groups_of(grpo.policy), 0, 1, rewards={"hand": bad}))
    assert told["invalid_completions"] == 1
    assert told["skipped_steps"] == 0
    assert all(np.isfinite(array).all() for array in weights(grpo).values())


def test_a_batch_without_any_valid_reward_changes_nothing():
    grpo = learner(config())
    before = weights(grpo)
    told = grpo.update(groups_of(grpo.policy, [[math.nan] * 4, [None] * 4]))
    assert (told["invalid_completions"], told["reward_mean"], told["loss"]) == (8, None, 0.0)
    assert_same_weights(before, weights(grpo))
    assert grpo.version == 1


def test_ten_steps_in_a_row_without_a_finite_gradient_end_the_run():
    grpo = learner(config(), total=100)
    good = groups_of(grpo.policy, REWARDS[:1])
    bad = changed(good, 0, 0, logprobs=[math.nan] * len(good[0].completions[0].tokens))
    before = weights(grpo)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        grpo.update(bad)
    assert_same_weights(before, weights(grpo))
    grpo.update(good)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        grpo.update(bad)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        grpo.update(bad)


# --- the rest -------------------------------------------------------------------------------------


def test_the_rate_rises_from_the_first_update_on_and_falls_to_the_last():
    grpo = learner(
        config(warmup_ratio=0.4, lr_scheduler_type="linear", learning_rate=1e-4, num_iterations=2), total=5
    )
    groups = groups_of(grpo.policy, REWARDS[:1])
    rates = [grpo.update(groups)["learning_rate"] for _ in range(5)]
    # 10 steps, of which 4 warm up: steps 1, 3, 5, 7, 9 are told, with 2/4, 4/4, 5/6, 3/6, 1/6 of the peak.
    assert rates == pytest.approx([5e-5, 1e-4, 5 / 6 * 1e-4, 5e-5, 1 / 6 * 1e-4])


def test_dropout_is_on_for_the_gradient_alone_and_the_same_after_a_resume():
    def run(dropout, version=0):
        settings = config(
            model={"fine_tune_type": "lora", "lora_rank": 4, "lora_dropout": dropout}, learning_rate=1e-2
        )
        grpo = learner(settings)
        grpo.version = version
        # B = 0 at first, so that dropout in A's input shows from the second step on.
        groups = groups_of(load_policy(settings.model, seed=0))
        mx.random.uniform()  # whatever was drawn before must not matter
        grpo.update(groups)
        grpo.update(groups)
        assert not grpo.policy.model.training
        return weights(grpo)

    plain, dropped = run(0.0), run(0.5)
    assert any((plain[name] != dropped[name]).any() for name in plain)
    assert_same_weights(dropped, run(0.5))
    assert any((dropped[name] != other).any() for name, other in run(0.5, version=1).items())


def test_gradient_checkpointing_changes_no_update():
    results = []
    for recompute in (False, True):
        grpo = learner(config(gradient_checkpointing=recompute))
        results.append((grpo.update(groups_of(grpo.policy)), weights(grpo)))
    assert results[0][0]["grad_norm"] == pytest.approx(results[1][0]["grad_norm"], rel=1e-6)
    for name, array in results[0][1].items():
        np.testing.assert_allclose(array, results[1][1][name], atol=2e-6)


def test_a_learner_made_anew_from_its_state_goes_on_bit_for_bit():
    straight = learner(config())
    groups = groups_of(straight.policy)
    straight.update(groups)
    resumed = learner(config())
    resumed.policy.load_trainable(straight.policy.trainable())
    resumed.training.load_state(straight.training.state())
    resumed.version = straight.version
    told = [grpo.update(groups) for grpo in (straight, resumed)]
    for key in ("loss", "grad_norm", "reward_mean", "entropy"):
        assert told[0][key].hex() == told[1][key].hex()
    assert_same_weights(weights(straight), weights(resumed))
