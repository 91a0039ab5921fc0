"""Each part on the embedded model, tiny: figures are finite and consistent. Their size is not tested."""

import json
import math

import pytest
from commands import run_here

from grpo_actors.bench.__main__ import main
from grpo_actors.bench.bench_process import BenchProcess
from grpo_actors.bench.end_to_end import write_problems
from grpo_actors.config import Config
from grpo_actors.errors import RunError
from grpo_actors.policy.model import load_policy
from grpo_actors.tasks.dataset import DataSet

SMALL = ["--groups", "2", "--generations", "2", "--tokens", "5", "--prompt-tokens", "6", "--rounds", "2"]
#: Bytes of a version: 697,472 parameters in float32; every tensor's size is already a multiple of 64 bytes.
TINY_BYTES = 697_472 * 4


def bench(capsys, part, *arguments):
    """Run a part; returns the figures of its JSON, all of which must be finite numbers."""
    assert main([part, *SMALL, "--json", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert all(math.isfinite(value) for figure in figures.values() for value in figure["values"])
    return figures


def test_sampling_counts_every_token_of_every_completion(capsys):
    figures = bench(capsys, "rollout")
    assert figures["tokens a round"]["values"] == [2 * 2 * 5]
    assert figures["steps"]["values"] == [5, 5]
    assert figures["tokens/s"]["median"] > 0
    assert len(figures["tokens/s"]["values"]) == 2
    assert "mlx-lm tokens/s" not in figures


def test_mlx_lm_decodes_as_many_steps_as_our_sampler(capsys):
    figures = bench(capsys, "rollout", "--against", "mlx-lm")
    assert figures["mlx-lm steps"]["values"] == [5, 5]
    rates = zip(figures["tokens/s"]["values"], figures["mlx-lm tokens/s"]["values"], strict=True)
    assert figures["ours ÷ mlx-lm"]["values"] == pytest.approx([ours / theirs for ours, theirs in rates])


def test_ragged_completions_share_fewer_places_and_have_their_planned_lengths(capsys):
    figures = bench(capsys, "rollout", "--ragged", "--places", "2", "--tokens", "20", "--against", "mlx-lm")
    # σ = ln(1 / 0.45) / Φ⁻¹(0.8) = 0.949; Φ⁻¹(1/8) = −1.150 and Φ⁻¹(3/8) = −0.319, times 0.45 · 20 tokens:
    # 9 · e^−1.091 = 3.02, 9 · e^−0.302 = 6.65, 9 · e^0.302 = 12.2, 9 · e^1.091 = 26.8, which is cut at 20.
    assert figures["tokens a round"]["values"] == [3 + 7 + 12 + 20]
    # Two places need at least 21 steps for 42 tokens. Both samplers' rates count the same tokens.
    assert figures["steps"]["floor"] == 21
    assert min(figures["steps"]["values"]) >= 21
    assert min(figures["mlx-lm steps"]["values"]) >= 21


def test_processes_at_the_same_time_add_their_tokens(capsys):
    figures = bench(capsys, "rollout", "--processes", "2")
    assert figures["tokens a round"]["values"] == [2 * 2 * 2 * 5]
    # Both processes share one machine: their added rate has the floor of one process, a step that of two.
    rate, step = figures["decode tokens/s"], figures["ms a step"]
    rows = 2 * 2
    assert rate["floor"] == pytest.approx(2 * 1000 * rows / step["floor"])


def test_an_update_computes_each_prompt_with_each_completion(capsys):
    figures = bench(capsys, "learner")
    assert figures["tokens an update"]["values"] == [2 * 2 * (6 + 5)]
    per_s = [44 / seconds for seconds in figures["update s"]["values"]]
    assert figures["tokens/s"]["values"] == pytest.approx(per_s)


def test_settings_reach_the_learner(capsys):
    figures = bench(capsys, "learner", "--set", "fine_tune_type=lora", "--set", "num_iterations=2")
    assert figures["tokens an update"]["values"] == [2 * 2 * 2 * (6 + 5)]


@pytest.mark.parametrize("way", [[], ["--chunks"]])
def test_a_version_reaches_two_processes(capsys, way):
    figures = bench(capsys, "weights", "--fetchers", "2", *way)
    assert figures["version MB"]["values"] == [TINY_BYTES / 1e6]
    parts = (figures[name]["values"] for name in ("publish to announced s", "announced to adopted s"))
    whole = [announced + fetched for announced, fetched in zip(*parts, strict=True)]
    assert figures["publish to adopted s"]["values"] == pytest.approx(whole)


@pytest.mark.slow
def test_simulated_workers_get_their_acknowledgements(capsys):
    figures = bench(capsys, "exchange", "--workers", "3", "--groups", "4", "--rounds", "1")
    assert figures["waiting: beats/s"]["floor"] == 3
    # A group is a grant, itself and an ack; beats come in addition.
    assert figures["busy: messages/s"]["median"] >= 2.5 * figures["busy: groups/s"]["median"] > 0
    assert 0 < figures["busy: exchange's share of a core"]["median"] <= 1


@pytest.mark.slow
def test_a_whole_run_has_prompts_and_completions_of_the_length_asked_for(capsys):
    figures = bench(capsys, "end-to-end", "--warmup", "1", "--set", "workers=1")
    assert len(figures["update s"]["values"]) == 2
    assert 0 < figures["completion tokens"]["median"] <= 5
    assert 0 <= figures["learner waited, share"]["median"] <= 1


@pytest.mark.slow
def test_the_completions_of_a_whole_run_have_the_lengths_of_a_file(capsys, tmp_path):
    (tmp_path / "lengths.json").write_text("[4]")
    lengths = ("--lengths", str(tmp_path / "lengths.json"), "--tokens", "9")
    figures = bench(capsys, "end-to-end", "--warmup", "1", "--set", "workers=1", *lengths)
    assert figures["completion tokens"]["values"] == [4, 4]


@pytest.mark.slow
def test_the_floor_of_a_workers_start_is_a_process_that_only_loads_the_model(capsys):
    figures = bench(capsys, "startup", "--rounds", "1")
    assert figures["worker ready s"]["floor"] == figures["model loaded in a fresh process s"]["median"]
    assert figures["grpo train --help s"]["median"] > 0
    assert figures["launch to first update s"]["median"] > 0


def test_the_prompts_of_a_whole_run_have_exactly_the_tokens_asked_for(tmp_path):
    write_problems(tmp_path / "problems.jsonl", 17)
    policy = load_policy(Config().model, seed=0)
    problems = DataSet(str(tmp_path / "problems.jsonl")).problems("train")
    assert {len(policy.chat.encode(problem.messages)) for problem in problems} == {17}


def test_a_process_that_fails_to_start_ends_the_bench_with_one_line():
    config = Config.model_validate({"model": {"model_name": "/nowhere"}}).model_dump_json()
    message = r"grpo_actors\.bench\.fetcher.*ended with 2"
    fetcher = BenchProcess("grpo_actors.bench.fetcher", config, processes=1)
    with fetcher, pytest.raises(RunError, match=message):
        fetcher.answer()


def test_a_process_that_ended_before_its_order_ends_the_bench_with_one_line():
    gone = BenchProcess("this", processes=1)
    gone._process.wait()
    with gone, pytest.raises(RunError, match=r"this: a process of the bench ended with 0"):
        gone.send({})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--random", "gpt-7"], ["--random", "gpt-7", "qwen2.5-0.5b", "llama-3.2-1b"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--rounds", "0"], ["--rounds", "at least 1", "0"]),
        (["--tokens", "1"], ["--tokens", "at least 2", "1"]),
        (["--set", "nonsense=1"], ["nonsense"]),
        (["--groups", "4", "--set", "batch_size=3"], ["batch_size", "--groups = 4", "got 3"]),
        (["--groups", "4", "--set", "gradient_accumulation_steps=2"], ["--groups = 4", "got 8"]),
    ],
)
def test_unusable_options_are_refused_in_one_line(arguments, words):
    done = run_here(main, "learner", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
