"""A trial finds planted mistakes by name, samples what the run's first update trains on, and writes nothing."""

import contextlib
import io
import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from bounds import HANG_S
from commands import launch_here

from grpo_actors.config import load_config
from grpo_actors.learner.exchange_setup import build_supply
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.loading import load_model
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rundir.claim import with_rewards
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.tasks.task import Problem
from grpo_actors.trial import sampling
from grpo_actors.trial.sampling import Sampled
from grpo_actors.trial.trial import run_trial

ROOT = Path(__file__).parents[2]
#: Two groups of four completions: the model answers about four in ten sums, and one group with mixed rewards is enough.
SMALL = ("num_generations=4", "batch_size=2", "batch_groups=2")


def tried(capsys, *overrides):
    """The exit code of a trial on the embedded model, and the lines that it printed."""
    code = run_trial(load_config("quickstart.toml", [*SMALL, *overrides]).config)
    return code, capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def plain():
    """The lines of a trial of these settings."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_trial(load_config("quickstart.toml", SMALL).config)
    return printed.getvalue().splitlines()


def named(lines):
    """The names of the findings that block."""
    return {line.split(": ")[1] for line in lines if line.startswith("CHANGE: ")}


def test_a_trial_of_the_quickstart_is_ready_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--config", "quickstart.toml", "--trial"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    split = "6% of the problems (1,200) are held out for evaluation, 20,000 are to train on"
    assert done.stderr == f"note: {split}\n"
    assert done.stdout.splitlines()[-1] == "ready"
    # The special tokens are shown, the rewards of each completion, and what the whole run will take.
    for seen in ("<|user|>", "<|assistant|>", "system prompt: none", "strict_format", "for 110 updates"):
        assert seen in done.stdout


def test_a_reward_that_is_always_0_is_found(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nothing.py").write_text(
        "def nothing(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    code, lines = tried(capsys, 'reward.functions={"nothing.py:nothing" = 1.0}')
    assert (code, named(lines)) == (2, {"reward is zero"})
    assert lines[-1] == "not ready: 1 to change first"


def test_one_silent_reward_among_others_is_a_note(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nothing.py").write_text(
        "def nothing(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    code, lines = tried(capsys, 'reward.functions={correctness = 1.0, "nothing.py:nothing" = 1.0}')
    assert code == 0
    assert any(line.startswith("note: nothing.py:nothing is 0: for all 8 completions") for line in lines)


def test_a_reward_that_raises_is_found_with_its_problem(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text(
        "def broken(completions, **columns):\n    return [{}['gold'] for _ in completions]\n"
    )
    code, lines = tried(capsys, 'reward.functions={"broken.py:broken" = 1.0}')
    assert code == 2
    [failing] = [line for line in lines if line.startswith("CHANGE: broken.py:broken fails: ")]
    assert "KeyError" in failing
    assert failing.endswith("for 8 of 8 completions")


def test_answers_that_are_cut_are_found_with_the_setting(capsys):
    # The shortest answer, "<answer>3</answer>", has more than 4 tokens.
    code, lines = tried(capsys, "max_new_tokens=4")
    assert code == 2
    assert any(
        "cut" in line and "rollout.max_new_tokens" in line for line in lines if line.startswith("CHANGE")
    )


@pytest.fixture(scope="module")
def setting():
    """A configuration with two groups of an update, a policy and a supply."""
    config = load_config("quickstart.toml", [*SMALL[:2], "batch_groups=1", "max_new_tokens=4"]).config
    task = open_task(config)
    config = with_rewards(config, task)
    policy = load_model(config)
    return config, policy, build_supply(config, task, policy)


@pytest.fixture
def sampled(setting, monkeypatch):
    """Sample within so many seconds; one passes from one look at the clock to the next."""

    def sample(within_s, **rollout):
        config, policy, supply = setting
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
        calls = count(1000)
        monkeypatch.setattr(sampling, "time", SimpleNamespace(monotonic=lambda: float(next(calls))))
        with open_scorer(config) as scorer:
            return sampling.sample_groups(config, policy, supply, scorer, None, within_s=within_s)

    return sample


def test_no_group_begins_after_half_of_the_time(sampled):
    whole = sampled(within_s=1e9)
    assert (len(whole.groups), whole.cut) == (2, False)
    # Besides sampling, the clock is read once before it and once behind it.
    first_s = whole.sampling_s / 2 + 2
    for within_s, groups in ((2 * first_s, 1), (2 * first_s + 1, 2)):
        assert len(sampled(within_s).groups) == groups


def test_of_groups_under_way_when_the_time_ends_only_the_very_first_are_taken(sampled):
    both = sampled(within_s=4.0, batch_groups=2)
    assert (len(both.groups), both.cut) == (2, True)
    # One look at the clock begins the sampling; while the others find less than four seconds, a token is sampled.
    assert {len(each.tokens) for each in both.completions} == {1}
    assert both.tokens == 8
    # The weights are those with which the run starts.
    assert {version for each in both.completions for version in each.versions} == {0}
    # Without a token there is nothing to look at.
    none = sampled(within_s=3.0, batch_groups=2)
    assert (none.groups, none.cut) == ([], True)


def test_an_environment_replies_in_a_trial_as_in_a_run(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("again.py").write_text("def again(messages, answer):\n    return 'Sure?'\n")
    settings = [
        "batch_size=1",
        "gradient_accumulation_steps=1",
        "batch_groups=1",
        "num_generations=4",
        "max_turns=2",
    ]
    config = load_config("quickstart.toml", [*settings, "environment=again.py:again"]).config
    task = open_task(config)
    config, (_, policy, _) = with_rewards(config, task), setting
    supply = build_supply(config, task, policy)
    with open_scorer(config) as scorer, open_episodes(config, policy) as episodes:
        done = sampling.sample_groups(config, policy, supply, scorer, episodes, within_s=HANG_S)
    assert {each.turns for each in done.completions} == {2}


def test_the_first_error_of_a_reward_is_told():
    problem = Problem("sum", (), "5")
    groups = [
        SampledGroup(n, 0, problem, [2], "trial", [], failures=failures)
        for n, failures in enumerate(({}, {"right": "first"}, {"right": "second", "environment": "third"}))
    ]
    assert Sampled(groups).failures == {"right": "first", "environment": "third"}


def test_prompts_over_the_limit_are_found_with_their_share(capsys):
    # "There are …" has 15 tokens or more, every shorter form fewer than 31: with 20 some are left out, not all.
    code, lines = tried(capsys, "max_prompt_length=20")
    assert code == 2
    assert named(lines) == {"prompt too long"}
    [line] = [line for line in lines if line.startswith("CHANGE: prompt too long")]
    assert "of 1000 prompts have more than 20 tokens (data.max_prompt_length)" in line


def test_a_template_that_never_ends_a_turn_is_found(capsys):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant:"
    code, lines = tried(capsys, f'chat_template="{template}"')
    assert code == 2
    assert "end of turn" in named(lines)


def test_a_column_that_is_not_there_is_named_before_the_model_is_loaded(tmp_path):
    (tmp_path / "sums.jsonl").write_text(
        "".join(f'{{"question": "{n} + 1?", "gold": {n + 1}}}\n' for n in range(20))
    )
    (tmp_path / "mine.py").write_text(
        "def right(completions, solution, **columns):\n    return [0.0] * len(completions)\n"
    )
    overrides = ("clip_eps=0.2", "clip_eps_high=0.1")
    overrides += ("task=dataset", "path=sums.jsonl", 'reward.functions={"mine.py:right" = 1.0}')
    settings = [word for override in overrides for word in ("--set", override)]
    done = launch_here("--config", "quickstart.toml", "--trial", *settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("note: objective.clip_eps_high = 0.1 lies below clip_eps = 0.2: ")
    assert "'mine.py:right' needs the column 'solution'" in done.stderr
    assert "the training data has answer, gold, question" in done.stderr


def test_a_trial_without_a_fault_tells_nothing_but_that_it_is_ready(plain):
    assert [line for line in plain if line.startswith(("note: ", "CHANGE: "))] == []
    assert plain[-1] == "ready"


def test_completions_are_those_that_the_run_trains_on_first(plain, tmp_path):
    shown = [
        line.removeprefix("rewards of problem ").split(",")[0]
        for line in plain
        if "rewards of problem" in line
    ]
    settings = [
        word
        for pair in (
            *SMALL,
            "max_updates=1",
            "eval_every_updates=0",
            "write_report=false",
            f"output_dir={tmp_path}",
        )
        for word in ("--set", pair)
    ]
    subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--config", "quickstart.toml", *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        timeout=HANG_S,
    )
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    [update] = [record for record in records if record["topic"] == "metrics"]
    assert shown == [problem for _, _, problem, _ in update["ledger"]]
    mean = next(line for line in plain if line.startswith("reward       correctness"))
    assert f"mean {update['rewards']['correctness']:.2f}" in mean


def test_workers_that_quantise_are_tried_quantised(capsys, plain):
    _, coarse = tried(capsys, "quantize_for_rollouts=true", "rollout_bits=4")

    def gap(lines):
        [line] = [line for line in lines if line.startswith("log-probs ")]
        return float(line.split("differ by ")[1].split()[0])

    assert gap(plain) < 1e-4 < gap(coarse)
