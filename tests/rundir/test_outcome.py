"""The lines on what a run has gained."""

from checkpoint_files import write_checkpoint_files
from scores import report, score

from grpo_actors.config import load_config
from grpo_actors.rundir.checkpoints import mark_best
from grpo_actors.rundir.outcome import continuing, gained, kept_checkpoint
from grpo_actors.rundir.scores import SavedScore, write_score
from grpo_actors.score import Estimate

ON = "on 10 held-out problems"


def summary(run_dir):
    return f"{gained(run_dir)}\n{kept_checkpoint(run_dir)}"


def save(path, value, **more):
    write_score(path, SavedScore(report=report(value, **more), values=[value]))


def test_it_says_what_was_measured_and_whether_the_gain_is_a_difference(tmp_path):
    write_checkpoint_files(tmp_path, 3)
    write_checkpoint_files(tmp_path, 4)
    assert summary(tmp_path) == f"not evaluated\nlast checkpoint: {tmp_path}/checkpoint-4"
    save(tmp_path / "evaluation-base.json", 0.25)
    save(
        tmp_path / "checkpoint-3" / "evaluation.json",
        0.5,
        gain=Estimate(value=0.25, low=-0.125, high=0.5),
    )
    mark_best(tmp_path, 3, score(0.5))
    scores = "0.250 [0.150, 0.350] (base model) → 0.500 [0.400, 0.600] (best, update 3)"
    gain = "+0.250 [-0.125, +0.500]: no difference that these problems show"
    assert summary(tmp_path).splitlines() == [
        f"accuracy, greedy, {ON}: {scores}, {gain}",
        f"best checkpoint: {tmp_path}/checkpoint-3",
    ]
    # Measured differently: not put side by side.
    save(tmp_path / "evaluation-base.json", 0.25, temperature=1.0)
    assert summary(tmp_path).startswith("accuracy, greedy, on 10 held-out problems: ? (base model) → ")


def test_if_no_checkpoint_beat_the_base_model_it_says_so(tmp_path):
    write_checkpoint_files(tmp_path, 4)
    mark_best(tmp_path, 0, score(1.5, metric="reward", temperature=1.0))
    base = f"reward, sampled at temperature 1, {ON} 1.500 [1.400, 1.600]"
    assert summary(tmp_path).startswith(f"not evaluated but for the base model: {base}\n")
    save(tmp_path / "checkpoint-4" / "evaluation.json", 1.0)
    assert summary(tmp_path).splitlines() == [
        f"reward, sampled at temperature 1, {ON}: no checkpoint beat the base model, 1.500 [1.400, 1.600]",
        f"last checkpoint: {tmp_path}/checkpoint-4",
    ]


def test_a_best_checkpoint_that_is_gone_or_a_base_without_a_score_leaves_its_part_out(tmp_path):
    assert summary(tmp_path) == "not evaluated\nlast checkpoint: none"
    mark_best(tmp_path, 3, score(0.5))
    assert summary(tmp_path).splitlines() == [
        f"accuracy, greedy, {ON}: ? (base model) → 0.500 [0.400, 0.600] (best, update 3)",
        f"best checkpoint: {tmp_path}/checkpoint-3",
    ]


def test_a_run_is_continued_with_its_saved_settings_and_the_changed_ones(tmp_path):
    config = load_config(None, ["task=arithmetic"]).config
    command = continuing(tmp_path, config, "max_updates=5", "run_name=a b")
    assert command.endswith(f" train {tmp_path}/config.json --set max_updates=5 --set 'run_name=a b'")
    assert continuing(tmp_path, config).endswith(f" train {tmp_path}/config.json")
    # Functions of a program are not in the file: the program calls again.
    own = ("functions={'caller:brevity' = 0.5, correctness = 1.0}", "environment=caller:shop")
    program = load_config(None, ["task=arithmetic", *own]).config
    assert continuing(tmp_path, program, "output_dir=there") == (
        f"in Python, train(config='{tmp_path}/config.json', rewards={{brevity: 0.5, 'correctness': 1}}, environment=shop, "
        "output_dir='there')"
    )
    calculator = load_config(None, ["task=arithmetic", own[0], "environment=calculator"]).config
    assert continuing(tmp_path, calculator).endswith("'correctness': 1})")
