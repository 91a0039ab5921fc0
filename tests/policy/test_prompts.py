"""A prompt computed once for all its completions gives the same results as a prompt before each of them."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import VOCABULARY, random_policy
from mlx import nn
from mlx.utils import tree_flatten

from grpo_actors.config import ModelConfig
from grpo_actors.objective.micro_batches import Completion, pack
from grpo_actors.policy.logprobs import completion_logprobs, micro_batch_logprobs
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.recomputation import recomputed_blocks
from grpo_actors.policy.shared_prompts import shares_prompts, unshared_rows

#: Families whose layers all keep keys and values of every position; stablelm's head is not plain.
SHARING = ["llama", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi3", "smollm3", "stablelm", "nanochat"]
#: Families with sliding windows, convolutions or states.
NOT_SHARING = ["gemma3_text", "olmo3", "lfm2", "mamba", "mamba2", "qwen3_next"]


def completions_of(prompts=((17, 3), (1, 2), (5, 4), (30, 1)), vocabulary=VOCABULARY):
    """Make random completions of 1 to 20 tokens; `prompts` gives each prompt's length and number of completions."""
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(0, vocabulary, n).tolist()  # noqa: E731
    completions = []
    for length, count in prompts:
        prompt = ids(length)
        for _ in range(count):
            n = int(rng.integers(1, 21))
            completions.append(Completion(prompt, ids(n), [-0.5] * n, float(rng.normal())))
    return completions


def batches_of(completions, rows=16):
    update = pack(completions, rows=rows, aggregation="dapo", max_new_tokens=20)
    return [batch.arrays() for batch in update.micro_batches]


def assert_sharing_changes_nothing(model, batches):
    """Compare log-probs and entropies within 1e-4, and the gradient of a loss that weights every token differently."""

    def loss(model, batch, shared):
        logprobs, entropies = micro_batch_logprobs(model, batch, 0.7, shared_prompts=shared)
        weights = batch["mask"] * (0.3 + mx.sin(mx.arange(logprobs.size)).reshape(logprobs.shape))
        return (weights * (logprobs + 0.1 * entropies)).sum(), (logprobs, entropies)

    gradient = nn.value_and_grad(model, loss)
    for batch in batches:
        (_, shared), by_shared = gradient(model, batch, True)
        (_, plain), by_plain = gradient(model, batch, False)
        mask = np.array(batch["mask"])
        for one, other in zip(shared, plain, strict=True):
            np.testing.assert_allclose(np.array(one)[mask], np.array(other)[mask], atol=1e-4)
        assert_same_gradient(by_shared, by_plain)


def assert_same_gradient(one, other, tolerance=1e-4):
    one, other = (dict(tree_flatten(tree)) for tree in (one, other))
    assert any(mx.abs(array).max() > 1e-3 for array in other.values())
    for name, array in other.items():
        scale = max(float(mx.abs(array).max()), 1e-3)
        np.testing.assert_allclose(np.array(one[name]), np.array(array), atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("family", SHARING)
def test_sharing_gives_the_same_log_probs_and_gradient_in_every_architecture_that_shares(family):
    policy = random_policy(family)
    assert shares_prompts(policy.model)
    assert_sharing_changes_nothing(policy.model, batches_of(completions_of()))


@pytest.mark.parametrize("family", NOT_SHARING)
def test_a_cache_that_does_not_keep_all_keys_and_values_is_not_shared(family):
    assert not shares_prompts(random_policy(family).model)


@pytest.mark.parametrize("family", ["gemma3_text", "mamba2"])
def test_unshared_rows_are_each_completion_after_its_prompt(family):
    # No token sees right padding, so a row gives the same log-probs as its tokens alone.
    completions, model = completions_of(), random_policy(family).model
    (packed,) = pack(
        completions, rows=16, aggregation="dapo", max_new_tokens=20, shared_prompts=False
    ).micro_batches
    batch = packed.arrays()
    tokens, start = (np.array(array) for array in unshared_rows(batch))
    logprobs, _ = micro_batch_logprobs(model, batch, 1.0, shared_prompts=False)
    rows = {
        tuple(ids[mask].tolist()): row
        for row, (ids, mask) in enumerate(zip(packed.targets, packed.mask, strict=True))
    }
    for each in completions:
        prompt, completion = each.prompt_ids, each.completion_ids
        row = rows[tuple(completion)]
        assert start[row] == len(prompt) - 1
        text = [*prompt, *completion][:-1]  # the last token predicts nothing
        assert tokens[row, : len(text)].tolist() == text
        alone, _ = completion_logprobs(
            model, mx.array([text]), mx.array([len(prompt) - 1]), mx.array([completion]), 1.0
        )
        np.testing.assert_allclose(np.array(logprobs)[row, : len(completion)], np.array(alone)[0], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_group_that_is_cut_shares_its_prompt_within_each_part(rows):
    batches = batches_of(completions_of(), rows)
    assert len(batches) == 10 // rows
    assert_sharing_changes_nothing(random_policy("llama").model, batches)


def moved(policy):
    """Move the adapter's A and B: a new adapter adds nothing (B = 0), and only B has a gradient."""
    policy.load_trainable({name: array + 0.01 for name, array in policy.trainable().items()})
    return policy


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "bits"), [("full", 0), ("lora", 0), ("lora", 4), ("dora", 0), ("dora", 4)])
def test_the_embedded_model_and_its_adapters_share(kind, bits):
    policy = load_policy(ModelConfig(dtype="float32", fine_tune_type=kind, base_bits=bits), seed=0)
    assert shares_prompts(policy.model)
    if kind != "full":
        moved(policy)
    assert_sharing_changes_nothing(policy.model, batches_of(completions_of(), rows=4))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "stablelm"])
def test_recomputed_blocks_pass_the_gradient_through_the_prompts_keys_and_values(family, compiled):
    model, (batch,) = random_policy(family).model, batches_of(completions_of())

    def loss(model, batch):
        logprobs, _ = micro_batch_logprobs(model, batch, 1.0, shared_prompts=True)
        return mx.where(batch["mask"], logprobs, 0.0).sum()

    gradient = nn.value_and_grad(model, loss)
    _, kept = gradient(model, batch)
    state = [model.state, mx.random.state]
    again = lambda batch: gradient(model, batch)  # noqa: E731
    with recomputed_blocks(model):
        _, recomputed = (mx.compile(again, inputs=state, outputs=state) if compiled else again)(batch)
    assert_same_gradient(recomputed, kept)
