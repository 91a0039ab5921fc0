"""The mathematics of the update: rewards to advantages, log-probs to a loss. Knows no model, no socket, no file.

The way of one update, as the learner calls it::

    scored = compute_advantages(objective.advantage, rewards, weights)  # the rewards of all its groups
    update = pack(completions, rows=16, aggregation=objective.aggregation, …)  # micro-batches and token weights
    for micro in update.micro_batches:  # gradients add up, and so do statistics
        loss, sums = objective_loss(logprobs, micro.arrays(), objective, reference_logprobs=…)
        total = add_statistics(total, sums)
    metrics = summary(total)

A loss is a function in `losses` and a row of `config.objective.LOSSES`. Each other menu is a table beside its
functions: `ADVANTAGES`, `AGGREGATIONS`, `KL_ESTIMATORS`, `CORRECTIONS`.
"""
