"""Measure how fast the parts of a run are on this machine: ``python -m grpo_actors.bench PART``.

Every claim of speed comes from here. One part (`job`) measures a real job from outside, from its launch to its exit.
Each of the others (`rollout`, `learner`, `publication`, `end_to_end`, `startup`) runs the code
of a real run on work of a known size. After warm-up rounds that do not count it measures several rounds, and reports
median and spread next to a floor: the time of the same work if memory bandwidth or matrix products were the only limit
(`peak_rates` measures both rates, `floors` has the arithmetic).
"""
