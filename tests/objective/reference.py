"""A second implementation of the objective, in plain Python floats over ragged lists, independent of the package.

It has no padding, no masks and no micro-batches: a completion that does not train is skipped. Where a formula has a
stop-gradient, the function takes the frozen value as a separate argument, so that finite differences match
automatic differentiation.
"""

import math
import statistics


def rewards_of(group, weights):
    """Weighted sums; None for a completion to which no function of weight other than 0 gave a number."""
    totals = []
    for row in group:
        given = [w * r for r, w in zip(row, weights, strict=True) if r is not None and w != 0]
        totals.append(sum(given) if given else None)
    return totals


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def advantages(name, groups, weights):
    """A list for each group; None where invalid."""
    totals = [rewards_of(g, weights) for g in groups]
    if name == "gdpo":
        return _gdpo(groups, weights, totals)
    everything = [r for t in totals for r in t if r is not None]
    result = []
    for total in totals:
        known = [r for r in total if r is not None]
        mean = statistics.fmean(known) if known else 0.0
        row = []
        for i, r in enumerate(total):
            if r is None:
                row.append(None)
            elif name == "group":
                row.append((r - mean) / (spread(known) + 1e-4))
            elif name == "none":
                row.append(r - mean)
            elif name == "batch":
                row.append((r - mean) / (spread(everything) + 1e-4))
            elif name == "rloo":
                others = [x for j, x in enumerate(total) if j != i and x is not None]
                row.append(r - statistics.fmean(others) if others else 0.0)
        result.append(row)
    return result


def _gdpo(groups, weights, totals):
    sums = []
    for group, total in zip(groups, totals, strict=True):
        row = [None if r is None else 0.0 for r in total]
        for k, weight in enumerate(weights):
            column = [r[k] for r in group if r[k] is not None]
            for i, r in enumerate(group):
                if r[k] is not None and row[i] is not None:
                    row[i] += weight * (r[k] - statistics.fmean(column)) / (spread(column) + 1e-4)
        sums.append(row)
    flat = [x for row in sums for x in row if x is not None]
    mean = statistics.fmean(flat) if flat else 0.0
    return [[None if x is None else (x - mean) / (spread(flat) + 1e-4) for x in row] for row in sums]


def clamp(x, low, high):
    return max(low, min(high, x))


def ratio(log_ratio):
    return math.exp(clamp(log_ratio, -20, 20))


def loss_of_token(name, A, r, numbers, *, logprob, frozen_ratio):
    """The loss by cases of the sign of A, where the papers write min and max."""
    low, high = 1 - numbers["clip_eps"], 1 + numbers["clip_eps_high"]
    if name in {"clip", "gspo", "gspo_token"}:
        return -A * min(r, high) if A >= 0 else -A * max(r, low)
    if name in {"two_sided", "dual_clip"}:
        bound = numbers["clip_delta" if name == "two_sided" else "dual_clip"]
        return -A * min(r, high) if A >= 0 else -A * clamp(r, low, bound)
    if name == "cispo":
        return -A * min(frozen_ratio, numbers["cispo_cap"]) * logprob
    if name == "sapo":
        tau = numbers["sapo_tau_positive" if A > 0 else "sapo_tau_negative"]
        return -A * (2 / tau) * (1 + math.tanh(tau * (r - 1) / 2))
    raise KeyError(name)


def ratios_of_completion(name, logprobs, frozen, anchor):
    """r of each token; for gspo_token the sequence's ratio is frozen and the token's own varies."""
    if name == "gspo":
        mean = sum(a - b for a, b in zip(logprobs, anchor, strict=True)) / len(logprobs)
        return [ratio(mean)] * len(logprobs)
    if name == "gspo_token":
        mean = sum(a - b for a, b in zip(frozen, anchor, strict=True)) / len(logprobs)
        return [ratio(mean) * math.exp(a - b) for a, b in zip(logprobs, frozen, strict=True)]
    return [ratio(a - b) for a, b in zip(logprobs, anchor, strict=True)]


def kl_of_token(name, logprob, reference):
    x = clamp(reference - logprob, -20, 20)
    return {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[name]


def corrections_of_completion(name, old, behaviour, floor, cap):
    if name == "none":
        return [1.0] * len(old)
    gaps = [a - b for a, b in zip(old, behaviour, strict=True)]
    if name.startswith("sequence"):
        gaps = [sum(gaps)] * len(gaps)
    weights = [ratio(g) for g in gaps]
    if name.endswith("truncate"):
        return [min(w, cap) for w in weights]
    return [w if floor <= w <= cap else 0.0 for w in weights]


def update_loss(update, objective, logprobs, *, frozen=None, entropies=None):
    """The whole update's loss. `update` is a `updates.RandomUpdate`; `frozen` defaults to `logprobs`."""
    numbers = objective.numbers
    frozen = logprobs if frozen is None else frozen
    entropies = update.entropies if entropies is None else entropies
    train = [i for i in range(update.size) if update.trains(i, objective.mask_truncated)]
    tokens = sum(len(update.completions[i]) for i in train)
    loss = 0.0
    for i in train:
        length = len(update.completions[i])
        divisor = {
            "grpo": length * len(train),
            "bnpo": tokens,
            "dapo": tokens,
            "dr_grpo": update.size * update.max_new_tokens,
        }[objective.aggregation]
        anchor = update.behaviour[i] if objective.ratio == "recorded" else update.old[i]
        r = ratios_of_completion(objective.loss, logprobs[i], frozen[i], anchor)
        w = corrections_of_completion(
            objective.correction,
            update.old[i],
            update.behaviour[i],
            objective.correction_floor,
            objective.correction_cap,
        )
        for t in range(length):
            frozen_ratio = ratio(frozen[i][t] - anchor[t])
            term = loss_of_token(
                objective.loss,
                update.advantages[i],
                r[t],
                numbers,
                logprob=logprobs[i][t],
                frozen_ratio=frozen_ratio,
            )
            if objective.top_entropy_share < 1 and not update.uncertain[i][t]:
                term = 0.0
            term *= w[t]
            term += objective.kl_coeff * kl_of_token(
                objective.kl_estimator, logprobs[i][t], update.reference[i][t]
            )
            term -= objective.entropy_coeff * entropies[i][t]
            loss += term / divisor
    return loss


def finite_differences(f, ragged, step=1e-6):
    """Gradient of f at ragged lists of floats, by central differences."""
    gradient = [[0.0] * len(row) for row in ragged]
    for i, row in enumerate(ragged):
        for t in range(len(row)):
            sides = []
            for h in (step, -step):
                moved = [list(r) for r in ragged]
                moved[i][t] += h
                sides.append(f(moved))
            gradient[i][t] = (sides[0] - sides[1]) / (2 * step)
    return gradient
