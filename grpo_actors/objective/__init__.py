"""The mathematics of the update: rewards to advantages, log-probs to a loss. Knows no model, no socket, no file.

The way of one update, as the learner calls it::

    scored  = compute_advantages("group", rewards, weights)       # rewards of all its groups
    update  = pack(completions, rows=16, ...)                     # micro-batches and token weights
    loss, s = objective_loss(logprobs, micro.arrays(), objective) # once a micro-batch; the gradients add up
    metrics = summary(add_statistics(total, s))

Each menu is a table (`ADVANTAGES`, `LOSSES`, `AGGREGATIONS`, `KL_ESTIMATORS`, `CORRECTIONS`): one more
algorithm is one function and one row.
"""

from grpo_actors.backend import load_fast_blas

load_fast_blas()
