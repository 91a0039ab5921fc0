"""Try a run before it starts: ``launch.py --trial``.

In one process and within two minutes: load the model, render the first prompt, sample and score the groups of the first
update, do that update, and print what was seen. Nothing is written. The verdict is "ready", or what to change first.
"""

import time

from grpo_actors.config import Config
from grpo_actors.learner.agreement import check_agreement
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.learner.exchange_setup import build_supply
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.loading import check_sampling, load_model
from grpo_actors.learner.prompts import PromptLimit
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.process import EXIT_USAGE
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rundir.claim import total_updates, with_rewards
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.trial import report
from grpo_actors.trial.sampling import sample_groups
from grpo_actors.trial.update import try_update
from grpo_actors.trial.verdict import Facts, Prompts, findings

#: Seconds for sampling; loading, rewards and the update come on top.
SAMPLING_S = 60.0
#: Problems whose prompts are measured.
MEASURED_PROMPTS = 1000


def run_trial(config: Config) -> int:
    """Try a run, print what was seen, and return the exit code: 0 if it is ready, else 2.

    Raises:
        GrpoActorsError: it could not even start; one line that names the problem and the cure.
    """
    started_s = time.monotonic()
    task = open_task(config)
    config = with_rewards(config, task)
    policy = load_model(config)
    check_sampling(config, policy, task.problems("train")[0])
    report.model(config, policy, time.monotonic() - started_s)
    prompts = measure_prompts(build_supply(config, task, policy))
    PromptLimit(policy, config.data.max_prompt_length).apply(task)
    supply = build_supply(config, task, policy)
    report.prompt(config, policy, supply, prompts)
    grpo = Grpo(config, policy, total_updates(config, len(task.problems("train"))))
    agreement = check_agreement(grpo, supply.prompt(next(supply.posed())))
    with open_scorer(config) as scorer, open_episodes(config, policy) as episodes:
        sampled = sample_groups(
            config, sampling_policy(config, policy), supply, scorer, episodes, within_s=SAMPLING_S
        )
    report.completions(config, policy, sampled)
    update = try_update(grpo, sampled.groups)
    found = findings(
        Facts(
            config=config,
            metrics=update.metrics,
            prompts=prompts,
            failures=sampled.failures,
            ends_turns=policy.chat.ends_turns,
            sampling_s=sampled.sampling_s,
            rewards_s=sum(sampled.reward_s.values()),
            cut=sampled.cut,
            notes=[] if agreement is None else [agreement],
        )
    )
    report.update(config, sampled, update, grpo.total_updates)
    report.verdict(found)
    return EXIT_USAGE if any(finding.blocks for finding in found) else 0


def sampling_policy(config: Config, policy: Policy) -> Policy:
    """Return the policy that samples as a worker's does: quantised if workers quantise, else the learner's own."""
    if not config.rollout.quantize_for_rollouts:
        return policy
    quantised = load_policy(config.model, seed=config.run.seed)
    quantised.quantize(config.rollout.rollout_bits)
    quantised.chat.use(config.data.chat_template, config.data.chat_template_kwargs)
    return quantised


def measure_prompts(supply: Supply) -> Prompts:
    """Return the lengths of the run's first prompts, those that are left out included."""
    positions = range(min(len(supply.problems), MEASURED_PROMPTS))
    return Prompts([len(supply.prompt(position)) for position in positions], supply.max_prompt_length)
