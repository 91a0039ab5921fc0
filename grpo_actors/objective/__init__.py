"""The mathematics of an update: from rewards to advantages, from log-probs to a loss.

Does not depend on a model, a socket or a file. The learner computes one update like this::

    scored = compute_advantages(objective.advantage, rewards, weights)  # the rewards of all its groups
    update = pack(completions, rows=16, aggregation=objective.aggregation, …)  # micro-batches and token weights
    for micro in update.micro_batches:  # gradients and statistics add up
        loss, sums = objective_loss(logprobs, micro.arrays(), objective, reference_logprobs=…)
        total = add_statistics(total, sums)
    metrics = summary(total)

A loss is a function in `losses` and a row of `config.objective.LOSSES`. Every other choice is a table next to its
functions: `ADVANTAGES`, `AGGREGATIONS`, `KL_ESTIMATORS`, `CORRECTIONS`.
"""
