"""What a trial prints, from handmade figures."""

from dataclasses import replace

from grpo_actors.config import Config, RewardConfig, load_config
from grpo_actors.learner.exchange_setup import build_supply
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.rendering import rendered
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.task import Problem
from grpo_actors.trial import report
from grpo_actors.trial.sampling import Sampled
from grpo_actors.trial.update import Update
from grpo_actors.trial.verdict import Finding, Prompts


def test_the_best_and_the_worst_completion_are_shown_and_the_rewards_of_all(tiny, capsys):
    rewards = {"correctness": 1.0, "strict_format": 0.5}
    config = Config(reward=RewardConfig(functions=rewards))

    def completion(tokens, correct, form, *, finished=True):
        given = {"correctness": correct, "strict_format": form}
        return SampledCompletion(tokens, [-0.1] * len(tokens), [0] * len(tokens), finished, given, [])

    middle = completion([5, 6], 1.0, 0.0)
    best, worst = completion([7, 8, 9], 1.0, 1.0), completion([10], None, 0.0, finished=False)
    problem = Problem("sum", ({"role": "user", "content": "2 + 3?"},), "5")
    groups = [SampledGroup(n, 0, problem, [2], "trial", [middle, best, worst, middle]) for n in range(2)]
    report.completions(config, tiny, Sampled(groups, reward_s={"correctness": 0.004, "strict_format": 0.0}))

    def text(tokens):
        return [f"  | {line}".rstrip() for line in rendered(tiny, tokens).split("\n")]

    table = [
        "",
        "rewards of problem sum, answer 5",
        "  | correctness    1  1  –  1",
        "  | strict_format  0  1  0  0",
    ]
    assert capsys.readouterr().out.splitlines() == [
        *("", "best completion of 4: reward 1.5, 3 tokens, ended", *text([7, 8, 9])),
        *("", "worst completion of 4: reward 0, 1 tokens, cut", *text([10])),
        *(*table, *table, ""),
        "reward       correctness, weight 1: mean 1.00, 2.0 ms a group",
        "reward       strict_format, weight 0.5: mean 0.25, 0.0 ms a group",
    ]


def group(*lengths):
    problem = Problem("sum", ({"role": "user", "content": "2 + 3?"},), "")
    completions = [
        SampledCompletion([5] * (2 + n), [-0.1] * (2 + n), [0] * (2 + n), True, {"correctness": 1.0}, [1, 3])
        for n in lengths
    ]
    return SampledGroup(0, 0, problem, [2], "trial", completions)


def test_five_groups_are_sampled_and_the_rewards_of_four_are_shown(tiny, capsys):
    config = Config(reward=RewardConfig(functions={"correctness": 1.0}))
    report.completions(config, tiny, Sampled([group(3)] * 5, reward_s={"correctness": 50.0}))
    lines = capsys.readouterr().out.splitlines()
    # An answer that the data do not have is a dash; the tokens of an environment's turn do not count.
    assert lines.count("rewards of problem sum, answer –") == 4
    assert "best completion of 1: reward 1, 3 tokens, ended" in lines
    assert lines[-1] == "reward       correctness, weight 1: mean 1.00, 10000.0 ms a group"


def test_the_figures_of_some_groups_are_projected_to_a_whole_update_and_a_whole_run(capsys):
    config = load_config(
        "quickstart.toml", ["batch_size=8", "gradient_accumulation_steps=1", "max_new_tokens=64"]
    ).config
    metrics = {
        "truncated_share": 0.5,
        "zero_variance_share": 0.25,
        "logprob_gap_mean": 1e-4,
        "logprob_gap_max": 0.002,
    }
    # 20 tokens in 4 s; two of the eight groups.
    sampled = Sampled(
        [group(1, 2), group(3, 14)], sampling_s=4.0, reward_s={"correctness": 0.5, "strict_format": 0.5}
    )
    report.update(config, sampled, Update(metrics, seconds=3.0, peak_bytes=1_500_000_000), total=10)
    assert capsys.readouterr().out.splitlines() == [
        # Of 1, 2, 3 and 14 the median is 2.5, and nine tenths of the way from the first to the last is 0.7 of the last step.
        "sampled      2 of the 8 groups of an update, 4 completions, 5 tokens/s; median 2, 90 % up to 11, longest 14 tokens",
        "             50 % cut at rollout.max_new_tokens = 64; 25 % of the groups have equal rewards",
        "log-probs    sampler and learner differ by 0.00010 nats on average, 0.0020 at most",
        "update       12.00 s for 8 groups, peak 1.50 GB",
        # Four times the two groups: 20 s of sampling and rewards, 12 s of an update; ten of them.
        "whole run    3:20 to 5:20 for 10 updates on this machine, evaluations not counted",
    ]


def test_where_the_update_is_the_longer_part_a_run_takes_at_least_that(capsys):
    config = load_config(
        "quickstart.toml", ["batch_size=1", "gradient_accumulation_steps=1", "batch_groups=1"]
    ).config
    sampled = Sampled([group(1, 2)], sampling_s=1.0, reward_s={})
    report.update(config, sampled, Update({}, seconds=3.0, peak_bytes=0), total=10)
    assert "whole run    0:30 to 0:40 for 10 updates" in capsys.readouterr().out


def test_the_verdict_comes_last_with_what_blocks_behind_the_notes(capsys):
    notes = [Finding("slow", "wait", blocks=False), Finding("odd", "look", blocks=False)]
    report.verdict([Finding("zero", "raise it"), notes[0], Finding("cut", "raise that"), notes[1]])
    assert capsys.readouterr().out.splitlines() == [
        *("", "note: slow: wait", "note: odd: look", "CHANGE: zero: raise it", "CHANGE: cut: raise that"),
        "not ready: 2 to change first",
    ]
    report.verdict(notes[:1])
    assert capsys.readouterr().out.splitlines() == ["", "note: slow: wait", "ready"]


def test_a_prompt_is_shown_with_its_breaks_and_a_long_one_without_its_middle(tiny, capsys):
    config = load_config("quickstart.toml").config
    task = open_task(config)

    def shown(text):
        problems = [Problem("sum", ({"role": "user", "content": text},), "5")]
        supply = replace(build_supply(config, task, tiny), problems=problems, order=ProblemOrder(1, seed=0))
        report.prompt(config, tiny, supply, Prompts([9, 10, 30, 9], limit=20))
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            "",
            f"first prompt: problem sum, {len(supply.prompt(0))} tokens; system prompt: none",
        ]
        assert lines[-1] == (
            # Of 9, 9, 10 and 30 nine tenths of the way are 0.7 of the last step: 24.
            "prompts      median 10, 90 % up to 24, longest 30 tokens; 25 % of 4 over data.max_prompt_length = 20"
        )
        return lines[2:-1]

    whole = shown("\n".join("abcdefghijklmnopqrst"))
    assert (whole[0], whole[1], len(whole)) == ("  | <|user|>a", "  | b", 20)
    cut = shown("\n".join("abcdefghijklmnopqrstu"))
    assert cut[:12] == whole[:12]
    assert cut[12:-1] == ["  | … 1 lines …", *(f"  | {letter}" for letter in "nopqrst")]
    assert cut[-1].startswith("  | u<|")
    second = "\n".join(("", "a" * 110, "b" * 111, ""))
    assert shown(second)[1:3] == [f"  | {'a' * 110}", f"  | {'b' * 110}…"]


def test_the_model_is_named_with_its_size_and_the_time_that_it_took(tiny, capsys):
    report.model(Config(), tiny, 1.25)
    assert capsys.readouterr().out == "model        tiny, 697.5k parameters, loaded in 1.2 s\n"


def test_a_line_is_written_at_once_also_into_a_file(tiny, tmp_path, monkeypatch):
    with (tmp_path / "printed").open("w") as file:
        monkeypatch.setattr("sys.stdout", file)
        report.model(Config(), tiny, 1.0)
        assert (tmp_path / "printed").read_text().startswith("model ")
