"""The mathematics of the update: rewards to advantages, log-probs to a loss. Knows no model, no socket, no file.

The way of one update, as the learner calls it::

    scored = compute_advantages(objective.advantage, rewards, weights)  # the rewards of all its groups
    update = pack(completions, rows=16, aggregation=objective.aggregation, …)  # micro-batches and token weights
    for micro in update.micro_batches:  # gradients add up, and so do statistics
        loss, sums = objective_loss(logprobs, micro.arrays(), objective, reference_logprobs=…)
        total = add_statistics(total, sums)
    metrics = summary(total)

Each menu is a table (`ADVANTAGES`, `LOSSES`, `AGGREGATIONS`, `KL_ESTIMATORS`, `CORRECTIONS`): one more
algorithm is one function and one row.
"""
