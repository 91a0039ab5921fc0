import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest

from grpo_actors.checkpoints import find_checkpoints
from grpo_actors.config import Config, LearnerConfig
from grpo_actors.errors import ConfigError, DataError, ModelError
from grpo_actors.evaluation import evaluate, held_out, wilson_interval
from grpo_actors.evaluator import EVALUATION_FILE, RunEvaluator, load_folder, settings
from grpo_actors.messages import Evaluation, decode, from_peer
from grpo_actors.policy.checkpoint import write_checkpoint
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.training import Training
from grpo_actors.processes.door import StopRequest
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import Scorer

ROOT = Path(__file__).parents[1]


def config(**sections):
    return Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "data": {"task": "arithmetic"},
            "rollout": {"max_new_tokens": 40},
            "evaluator": {"eval_subset_size": 16, "eval_sampled": True},
        }
        | sections
    )


def training_of(policy):
    return Training(policy.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))


def scored(policy, settings):
    task = load_task(settings.data, seed=settings.run.seed)
    with closing(Scorer(chosen_rewards({}, task), timeout_s=10)) as scorer:
        return evaluate(policy, task, held_out(task, settings, policy), settings, scorer)


# --- the interval ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By symmetry.
        (20, 20, 1 - 0.1611, 1.0000),
        (28, 29, 1 - 0.1718, 1 - 0.0061),
    ],
)
def test_the_interval_is_wilsons(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_holds_the_share_and_narrows_with_the_number():
    widths = []
    for total in (10, 100, 1000):
        low, high = wilson_interval(3 * total // 10, total)
        assert 0 < low < 0.3 < high < 1
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


# --- the problems ---------------------------------------------------------------------------------


def test_every_checkpoint_meets_the_same_problems_and_none_of_them_trains(tiny, tiny_lora):
    task = load_task(config().data, seed=0)
    chosen = [held_out(load_task(config().data, seed=0), config(), policy) for policy in (tiny, tiny_lora)]
    assert chosen[0] == chosen[1]
    assert len({problem.id for problem in chosen[0]}) == 16
    training = {problem.messages[-1]["content"] for problem in task.problems("train")}
    assert not training & {problem.messages[-1]["content"] for problem in chosen[0]}


def test_the_number_of_problems_is_as_asked_and_zero_means_all(tiny):
    task = load_task(config().data, seed=0)
    everything = len(task.problems("eval"))
    assert [len(held_out(task, config(), tiny, n)) for n in (1, 8, 0, 10**9)] == [
        1,
        8,
        everything,
        everything,
    ]
    with pytest.raises(ConfigError, match="--samples"):
        held_out(task, config(), tiny, -1)


def test_problems_too_long_are_left_out_and_none_left_is_an_error(tiny):
    short = config(data={"task": "arithmetic", "max_prompt_length": 1})
    with pytest.raises(DataError, match="max_prompt_length"):
        held_out(load_task(short.data, seed=0), short, tiny)


# --- the score ------------------------------------------------------------------------------------


def test_a_score_is_the_same_every_time_and_for_every_batch_size(tiny):
    wide = scored(tiny, config())
    narrow = scored(
        tiny, config(evaluator={"eval_subset_size": 16, "eval_sampled": True, "eval_batch_size": 3})
    )
    assert asdict(wide) | {"seconds": 0} == asdict(narrow) | {"seconds": 0}
    assert wide.samples == 16
    assert 0 <= wide.accuracy_low <= wide.accuracy <= wide.accuracy_high <= 1
    assert wide.sampled_accuracy is not None
    assert wide.rewards


def test_the_learner_can_receive_every_score(tiny):
    message = Evaluation(update=1, checkpoint="checkpoint-1", **asdict(scored(tiny, config())))
    assert message.samples == 16


# --- alone ----------------------------------------------------------------------------------------


def run_evaluator(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "grpo_actors.evaluator", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_alone_it_scores_the_embedded_model_as_json():
    done = run_evaluator(
        EMBEDDED, "--set", "task=arithmetic", "--set", "max_new_tokens=40", "--samples", 8, "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    score = json.loads(done.stdout)
    assert score["samples"] == 8
    assert score["accuracy"] in [right / 8 for right in range(9)]
    assert score["checkpoint"] == str(EMBEDDED)


def test_a_folder_without_a_model_is_one_line_and_exit_code_2():
    folder = ROOT / "grpo_actors"
    done = run_evaluator(folder, "--set", "task=arithmetic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(folder) in done.stderr


def test_a_checkpoint_is_scored_by_the_settings_of_its_run(run_dir, tiny):
    (run_dir / "config.json").write_text(config(run={"seed": 7}).model_dump_json())
    checkpoint = write_checkpoint(run_dir, 1, tiny, training_of(tiny), {}).path
    assert settings(checkpoint, None, []) == config(run={"seed": 7})
    changed = settings(checkpoint, None, ["max_new_tokens=9", "evaluator.eval_sampled=false"])
    assert (changed.rollout.max_new_tokens, changed.evaluator.eval_sampled, changed.run.seed) == (9, False, 7)
    assert settings(checkpoint, "smoke_test.toml", []).run.seed == 0, (
        "a file given takes the place of the run's"
    )
    assert settings(EMBEDDED, None, ["task=arithmetic"]) == Config.model_validate(
        {"data": {"task": "arithmetic"}}
    )


def test_what_is_overridden_is_checked_together_with_the_settings_of_the_run(run_dir, tiny):
    lora = {"fine_tune_type": "lora"}
    (run_dir / "config.json").write_text(config(model=lora).model_dump_json())
    checkpoint = write_checkpoint(run_dir, 1, tiny, training_of(tiny), {}).path
    assert settings(checkpoint, None, ["base_bits=8"]).model.base_bits == 8
    with pytest.raises(ConfigError, match=r"base_bits must be 0 when fine_tune_type is"):
        settings(checkpoint, None, ["fine_tune_type=full", "base_bits=8"])


def test_an_adapter_is_loaded_onto_its_base(run_dir, tiny_lora):
    lora = config(model={"dtype": "float32", "fine_tune_type": "lora", "lora_rank": 4})
    tiny_lora.load_trainable({name: array + 0.01 for name, array in tiny_lora.trainable().items()})
    folder = write_checkpoint(run_dir, 1, tiny_lora, training_of(tiny_lora), {}).path
    tokens = mx.array([[2, 21, 22, 15]])
    assert mx.array_equal(load_folder(folder, lora).model(tokens), tiny_lora.model(tokens))
    with pytest.raises(ConfigError, match="fine_tune_type"):
        load_folder(folder, config())


def test_a_full_checkpoint_is_a_model_whatever_the_settings_say_of_adapters(run_dir, tiny):
    lora = config(model={"dtype": "float32", "fine_tune_type": "lora"})
    folder = write_checkpoint(run_dir, 1, tiny, training_of(tiny), {}).path
    assert not load_folder(folder, lora).has_adapter
    with pytest.raises(ModelError, match="no such folder"):
        load_folder(run_dir / "checkpoint-2", lora)


# --- in a run -------------------------------------------------------------------------------------


class Post:
    """The evaluator's end of a connection that keeps what is sent, and asks to stop when nothing is left to do."""

    name = "evaluator"

    def __init__(self, stop):
        self.stop = stop
        self.evaluations = []

    def send(self, data):
        message = decode(from_peer, data)
        if isinstance(message, Evaluation):
            self.evaluations.append(message)
        return True

    def receive(self, wait_s):
        self.stop.set()


def follow(run_dir):
    stop = StopRequest()
    post = Post(stop)
    RunEvaluator(run_dir, post, config(), stop, beat_s=1e9).run()
    return [(e.update, e.checkpoint) for e in post.evaluations], post.evaluations


def test_in_a_run_the_base_and_every_checkpoint_are_scored_once(run_dir, tiny):
    training = training_of(tiny)
    write_checkpoint(run_dir, 5, tiny, training, {})
    tiny.load_trainable({name: array * 0 for name, array in tiny.trainable().items()})
    write_checkpoint(run_dir, 10, tiny, training, {})
    told, scores = follow(run_dir)
    assert told == [(0, "base"), (5, "checkpoint-5"), (10, "checkpoint-10")]
    assert scores[0].accuracy == scores[1].accuracy, "checkpoint-5 is the base"
    assert scores[2].accuracy == 0.0, "a model of zeros knows nothing"
    again, same = follow(run_dir)
    assert (again, same) == (told, scores), "kept beside the checkpoints, seconds and all"


def test_a_damaged_checkpoint_is_not_scored_until_it_is_written_again(run_dir, tiny, capsys):
    training = training_of(tiny)
    folder = write_checkpoint(run_dir, 5, tiny, training, {}).path
    (folder / "model.safetensors").write_bytes(b"")
    stop = StopRequest()
    post = Post(stop)
    evaluator = RunEvaluator(run_dir, post, config(), stop, beat_s=1e9)
    [damaged] = [evaluator._next_checkpoint()]
    evaluator._report_checkpoint(damaged, tiny, lambda: pytest.fail("scored"))
    assert "model.safetensors" in capsys.readouterr().err
    assert evaluator._next_checkpoint() is None
    write_checkpoint(run_dir, 5, tiny, training, {})
    assert evaluator._next_checkpoint() == find_checkpoints(run_dir)[0]
    assert not (folder / EVALUATION_FILE).exists()
