"""Random updates as ragged lists, and conversions between those and packed micro-batches."""

import mlx.core as mx
import numpy as np
from reference import advantages

from grpo_actors.objective.batch_loss import objective_loss
from grpo_actors.objective.micro_batches import Completion, Layout, pack
from grpo_actors.objective.statistics import add_statistics


class RandomUpdate:
    """Groups of different sizes, completions of different lengths (one is empty), some invalid, some truncated."""

    def __init__(self, seed, *, groups=3, equal_lengths=None, max_new_tokens=12, vocabulary=11):
        rng = np.random.default_rng(seed)
        sizes = [int(n) for n in rng.integers(2, 5, groups)]
        self.size, self.max_new_tokens, self.vocabulary = sum(sizes), max_new_tokens, vocabulary
        self.rewards = [[[_maybe(rng) for _ in range(2)] for _ in range(n)] for n in sizes]
        self.rewards[0][0] = [None, None]
        flat = [a for row in advantages("group", self.rewards, [1.0, 0.5]) for a in row]
        self.valid = [a is not None for a in flat]
        # float32 at once, so that the two sides start from the same numbers.
        self.advantages = [float(np.float32(a or 0.0)) for a in flat]
        lengths = [equal_lengths or int(n) for n in rng.integers(1, max_new_tokens + 1, self.size)]
        if equal_lengths is None:
            lengths[-1] = 0
        self.truncated = [bool(t) for t in rng.random(self.size) < 0.25]
        self.prompts = [[int(x) for x in rng.integers(0, vocabulary, rng.integers(1, 9))] for _ in lengths]
        self.completions = [[int(x) for x in rng.integers(0, vocabulary, n)] for n in lengths]
        self.behaviour = [_floats(-2 * rng.random(n)) for n in lengths]
        self.old = self._near(rng, self.behaviour, 0.5)
        self.logprobs = self._near(rng, self.behaviour, 0.5)
        self.reference = self._near(rng, self.logprobs, 0.8)
        self.entropies = [_floats(2 * rng.random(n)) for n in lengths]
        self.uncertain = [[bool(x) for x in rng.random(n) < 0.5] for n in lengths]

    @staticmethod
    def _near(rng, ragged, scale):
        return [_floats(np.array(row) + scale * rng.normal(size=len(row))) for row in ragged]

    def trains(self, i, mask_truncated):
        return self.valid[i] and len(self.completions[i]) > 0 and not (mask_truncated and self.truncated[i])

    def packed(self, objective, *, rows=4, tokens=10**6, order=None, **layout):
        """Pack the update, with the completions in `order` (None: as they are)."""
        order = list(range(self.size)) if order is None else order
        return pack(
            [
                Completion(
                    self.prompts[i],
                    self.completions[i],
                    self.behaviour[i],
                    self.advantages[i],
                    self.valid[i],
                    self.truncated[i],
                )
                for i in order
            ],
            Layout(tokens, rows, **layout),
            aggregation=objective.aggregation,
            max_new_tokens=self.max_new_tokens,
            mask_truncated=objective.mask_truncated,
        )

    def rows(self, micro_batch):
        """Yield each row that is no padding, and its completion: no two have the same ids and log-probs."""
        known = {(tuple(ids), tuple(self.behaviour[i])): i for i, ids in enumerate(self.completions)}
        for row, mask in enumerate(micro_batch.mask):
            if mask.any():
                targets = micro_batch.targets[micro_batch.target_at[row]]
                ids, logprobs = targets[mask], micro_batch.behaviour_logprobs[row][mask]
                yield row, known[tuple(ids.tolist()), tuple(logprobs.tolist())]


def inputs_of(update, micro_batch, objective):
    """Every further array that an objective may read, padded with values that must not matter."""
    names = ("old", "reference", "entropies")
    spread = {name: padded(update, micro_batch, getattr(update, name)) for name in names}
    mask = padded(update, micro_batch, update.uncertain).astype(bool)
    return {
        "old_logprobs": mx.array(spread["old"]),
        "reference_logprobs": mx.array(spread["reference"]),
        "entropies": mx.array(spread["entropies"]),
        "entropy_mask": mx.array(mask) if objective.top_entropy_share < 1 else None,
    }


def padded(update, micro_batch, ragged, fill=-7.5):
    """Return a ragged list, one row per completion, as float32 [N, C] in a micro-batch's rows."""
    array = np.full(micro_batch.mask.shape, fill, np.float32)
    for row, i in update.rows(micro_batch):
        array[row, : len(ragged[i])] = ragged[i]
    return array


def loss_and_gradient(update, objective, **packing):
    """Loss, ragged gradient with respect to log-probs, and statistics of a whole update, by the package."""
    loss, total, gradient = 0.0, None, [[0.0] * len(row) for row in update.logprobs]
    for m in update.packed(objective, **packing).micro_batches:
        batch, extra = m.arrays(), inputs_of(update, m, objective)

        def part(logprobs, batch=batch, extra=extra):
            return objective_loss(logprobs, batch, objective, **extra)

        (value, statistics), by_logprobs = mx.value_and_grad(part)(
            mx.array(padded(update, m, update.logprobs))
        )
        loss += value.item()
        total = add_statistics(total, statistics)
        by_logprobs = np.array(by_logprobs)
        assert not by_logprobs[~m.mask].any(), "padding has a gradient"
        for row, i in update.rows(m):
            gradient[i] = by_logprobs[row, : len(update.logprobs[i])].tolist()
    return loss, gradient, total


def _maybe(rng):
    return None if rng.random() < 0.2 else float(rng.normal())


def _floats(array):
    return [float(x) for x in np.asarray(array, np.float32)]
