import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from bounds import HANG_S
from commands import run_here
from written import write_checkpoint

from grpo_actors.config import Config, LearnerConfig, ModelConfig
from grpo_actors.errors import ConfigError, DataError
from grpo_actors.evaluator.__main__ import main
from grpo_actors.evaluator.comparison.compare import Options, evaluate_checkpoints
from grpo_actors.evaluator.comparison.files import chosen_file
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training
from grpo_actors.process import StopRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a run whose checkpoint-5 equals its base model and whose checkpoint-10 has only zeros as weights."""
    run_dir, tiny = tmp_path_factory.mktemp("made") / "run", load_policy(ModelConfig(dtype="float32"), seed=0)
    run_dir.mkdir()
    settings = {
        "model": {"dtype": "float32"},
        "data": {"task": "arithmetic"},
        "rollout": {"max_new_tokens": 30},
        "evaluator": {"eval_subset_size": 16},
    }
    (run_dir / "config.json").write_text(Config.model_validate(settings).model_dump_json())
    training = Training(tiny.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))
    write_checkpoint(run_dir, 5, tiny, training, {})
    tiny.load_trainable({name: array * 0 for name, array in tiny.trainable().items()})
    write_checkpoint(run_dir, 10, tiny, training, {})
    return run_dir


def evaluate(capsys, *checkpoints, **options):
    assert evaluate_checkpoints(Options(list(map(str, checkpoints)), **options), StopRequest()) == 0
    return capsys.readouterr().out


def test_a_run_is_shown_as_a_table_with_a_line_per_checkpoint(run, capsys):
    title, head, base, five, ten = evaluate(capsys, run).splitlines()
    assert title == "16 held-out problems of arithmetic, answered greedily in at most 30 tokens"
    assert head.split() == [
        *("checkpoint", "update", "accuracy", "95", "%", "length", "truncated"),
        *("correctness", "strict_format"),
    ]
    assert [line.split()[:2] for line in (base, five, ten)] == [
        [f"{run}/base", "0"],
        [f"{run}/checkpoint-5", "5"],
        [f"{run}/checkpoint-10", "10"],
    ]
    assert base.split()[2:] == five.split()[2:], "the same weights, the same problems"
    assert ten.split()[2:5] == ["0.0", "%", "0.0–19.4"], "Wilson's interval of 0 of 16: 3.8415/(16 + 3.8415)"


def test_the_system_prompt_of_the_training_is_used_and_shown_unless_it_is_turned_off(run, capsys, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["system_prompt"] = "Work it out."
    (run / "config.json").write_text(json.dumps(settings))

    def score(no_system):
        options = Options([str(run / "checkpoint-5")], samples=2, json=True, no_system=no_system)
        assert evaluate_checkpoints(options, StopRequest()) == 0
        printed = capsys.readouterr()
        return printed.err, json.loads(printed.out)["checkpoints"][0]["completions"]

    (said, asked), (silent, plain) = score(no_system=False), score(no_system=True)
    assert 'with the system prompt "Work it out."; --no-system leaves it out' in said
    assert "system prompt" not in silent
    assert asked != plain  # other prompts, other answers


def test_k_samples_of_each_problem_have_a_separate_table(run, capsys):
    head = evaluate(capsys, run / "checkpoint-5", k=4, samples=3).splitlines()[5]
    assert [word for word in head.split() if "@" in word] == ["avg@4", "maj@4", "pass@2", "pass@4"]


def test_the_json_has_every_figure_with_its_interval(run, capsys):
    document = json.loads(
        evaluate(capsys, run, k=4, temperature=0.5, samples=8, compare=("base", "checkpoint-10"), json=True)
    )
    assert (document["task"], document["max_new_tokens"]) == ("arithmetic", 30)
    base, five, ten = document["checkpoints"]
    assert [one["update"] for one in (base, five, ten)] == [0, 5, 10]
    assert base["sampled"] == five["sampled"], "the same draws"
    assert (base["sampled"]["k"], base["sampled"]["temperature"]) == (4, 0.5)
    assert list(base["sampled"]["passed"]) == ["1", "2", "4"]
    assert base["sampled"]["passed"]["1"]["value"] == pytest.approx(base["sampled"]["avg"]["value"])
    pair = document["comparison"]
    assert pair["only_first"] == round(8 * base["accuracy"]["value"])
    assert (pair["only_second"], pair["both_right"]) == (0, 0)
    assert pair["sampled_difference"]["value"] == pytest.approx(-base["sampled"]["avg"]["value"])


def test_compared_checkpoints_need_not_be_listed_and_a_listed_one_is_evaluated_once(run, capsys):
    pair = (str(run / "checkpoint-5"), str(run / "checkpoint-10"))
    lines = evaluate(capsys, compare=pair, samples=4).splitlines()
    assert len(lines) == 4 + 1 + 3
    listed = evaluate(capsys, run / "checkpoint-10", compare=pair, samples=4).splitlines()
    assert sorted(listed[2:4]) == sorted(lines[2:4])
    assert listed[4:] == lines[4:]


def test_every_answer_is_written_with_its_judgement(run, capsys, tmp_path):
    file = tmp_path / "answers.jsonl"
    document = json.loads(evaluate(capsys, run / "checkpoint-5", k=2, samples=8, answers=file, json=True))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({line["problem"] for line in lines}) == 8
    [result] = document["checkpoints"]
    right = sum(line["greedy"]["correct"] for line in lines)
    assert right / 8 == result["accuracy"]["value"]
    for line in lines:
        assert line["checkpoint"] == result["checkpoint"]
        assert line["update"] == 5
        assert line["prompt"].endswith("?")
        assert len(line["samples"]) == 2
        for one in (line["greedy"], *line["samples"]):
            assert one["correct"] == (one["answer"] == line["answer"]) == bool(one["rewards"]["correctness"])
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_existing_answers_are_not_replaced_but_an_empty_file_is(run, capsys, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.touch()
    evaluate(capsys, run / "checkpoint-5", samples=2, answers=file)
    kept = file.read_bytes()
    assert kept.count(b"\n") == 2
    # The file is checked first: the model does not exist either.
    done = run_here(main, tmp_path / "nowhere", "--answers", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: --answers: {file} exists and is not replaced; move it away, or choose another file\n"
    )
    assert file.read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_an_existing_plot_is_replaced(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "curve.svg"
    file.write_text("before")
    evaluate(capsys, "tiny", samples=2, plot=file, overrides=["task=arithmetic", "max_new_tokens=40"])
    assert file.read_bytes().startswith(b"<?xml")


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("before")

    def interrupted():
        with chosen_file(file, "--answers") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert file.read_text() == "before"
    (tmp_path / "answers.jsonl.tmp").write_text("left by a kill")
    with chosen_file(file, "--answers") as draft:
        assert draft.read_bytes() == b""
    with (
        pytest.raises(ConfigError, match=r"--plot: .*nowhere.* cannot be written: No such file"),
        chosen_file(tmp_path / "nowhere" / "x.png", "--plot"),
    ):
        pytest.fail("before anything is computed")


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_curve_is_plotted_as_png_and_svg(run, capsys, tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"curve.{suffix}"
    evaluate(capsys, run, "tiny", k=2, samples=2, plot=file)
    assert file.read_bytes().startswith(start)


def test_without_a_run_the_plot_has_a_point_for_each_checkpoint(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "models.svg"
    overrides = ["task=arithmetic", "max_new_tokens=40"]
    evaluate(capsys, "tiny", EMBEDDED, samples=2, plot=file, overrides=overrides)
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"checkpoints": []}, "name a checkpoint"),
        ({"k": 0}, "--k: must be ≥ 1 .*got 0"),
        ({"temperature": 0.5}, "--temperature: .*add --k"),
        ({"k": 2, "temperature": 0.0}, r"--temperature: must be > 0 .*got 0\.0"),
        ({"k": 2, "temperature": float("nan")}, "--temperature: must be > 0 .*got nan"),
        ({"plot": Path("curve.gif")}, r"--plot: must end in \.png or \.svg, got curve\.gif"),
    ],
)
def test_a_meaningless_option_is_refused(options, fault):
    with pytest.raises(ConfigError, match=fault):
        Options(**{"checkpoints": ["tiny"]} | options)


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        (("base", "checkpoint-7"), "--compare: checkpoint-7 is none of .*base, .*and no folder"),
        (("base", "{run}/base"), "--compare: must name two different checkpoints, got .*base twice"),
        (
            ("checkpoint-5", "{run}"),
            "--compare: .*run is a run; name one of its checkpoints, as .*checkpoint-10",
        ),
    ],
)
def test_a_comparison_needs_two_checkpoints(run, capsys, pair, fault):
    with pytest.raises(ConfigError, match=fault):
        evaluate(capsys, run, compare=tuple(name.format(run=run) for name in pair))


def test_candidates_with_different_problems_are_refused(run, capsys, tmp_path):
    # The embedded model with a longer chat template: fewer prompts are short enough.
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED, other)
    tokenizer = json.loads((other / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "How many, then? " + tokenizer["chat_template"]
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="other: its tokenizer"):
        evaluate(capsys, run / "checkpoint-5", other, overrides=["max_prompt_length=40"])


def test_the_command_line_scores_the_embedded_model_as_json():
    settings = ("--set", "task=arithmetic", "--set", "max_new_tokens=40")
    done = subprocess.run(
        [sys.executable, "-m", "grpo_actors.evaluator", EMBEDDED, *settings, "--samples", "8", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    [score] = document["checkpoints"]
    assert score["problems"] == 8
    assert score["accuracy"]["value"] in [right / 8 for right in range(9)]
    assert (score["checkpoint"], score["update"], score["sampled"]) == (str(EMBEDDED), None, None)
    assert document["comparison"] is None


def test_a_folder_without_a_model_is_one_line_and_exit_code_2():
    folder = ROOT / "grpo_actors"
    done = run_here(main, folder, "--set", "task=arithmetic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(folder) in done.stderr
