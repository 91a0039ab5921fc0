"""How fast the parts of a run are on this machine: ``python -m grpo_actors.bench PART``.

The one place that every claim of speed comes from. Each part (`rollout`, `learner`, `publication`, `end_to_end`,
`startup`) runs what a real run runs, on work of a known size, several rounds after some that do not count, and
tells medians and spread beside a floor: what the same work would take if this machine's memory or its matrix
products were all that it waits for (`machine` measures both, `floors` has the arithmetic).
"""
