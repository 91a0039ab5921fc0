from contextlib import closing
from dataclasses import asdict

import mlx.core as mx
import pytest
from evaluated import config
from written import write_checkpoint

from grpo_actors.config import LearnerConfig
from grpo_actors.errors import ConfigError, DataError
from grpo_actors.evaluator.following import RunEvaluator
from grpo_actors.evaluator.score import answer_problems, evaluate, held_out
from grpo_actors.policy.training import Training
from grpo_actors.process import StopRequest
from grpo_actors.progress import GIVEN_UP
from grpo_actors.rundir.folder import EVALUATION_FILE
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.wire.messages import Bye, Evaluation, Unscored, decode, encode, from_peer


def training_of(policy):
    return Training(policy.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))


def scored(policy, settings):
    task = load_task(settings.data, seed=settings.run.seed)
    with closing(Scorer(chosen_rewards({}, task), timeout_s=10)) as scorer:
        return evaluate(policy, task, held_out(task, settings, policy), settings, scorer)


# --- the problems ---------------------------------------------------------------------------------


def test_every_checkpoint_is_scored_on_the_same_problems_and_none_of_them_trains(tiny, tiny_lora):
    task = load_task(config().data, seed=0)
    chosen = [held_out(load_task(config().data, seed=0), config(), policy) for policy in (tiny, tiny_lora)]
    assert chosen[0] == chosen[1]
    assert len({question.problem.id for question in chosen[0]}) == 16
    training = {problem.messages[-1]["content"] for problem in task.problems("train")}
    assert not training & {question.problem.messages[-1]["content"] for question in chosen[0]}


def test_the_number_of_problems_is_as_requested_and_zero_means_all(tiny):
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


def test_a_row_that_becomes_free_takes_the_next_problem_and_answers_keep_the_order_of_questions(tiny):
    settings = config(evaluator={"eval_batch_size": 4})
    task = load_task(settings.data, seed=0)
    questions = held_out(task, settings, tiny, 64)
    steps, judged = [], []
    answered = answer_problems(
        *(tiny, task, questions, settings, None),
        temperature=1.0,
        on_step=steps.append,
        on_answers=judged.append,
    )
    assert [one.problem for one in answered] == [question.problem for question in questions]
    assert sum(judged) == 64
    lengths = [one.answers[0].tokens for one in answered]
    assert sum(steps) == sum(lengths)
    # A row idles for one step when it ends, and at the end all wait for the longest. Batches of four would take the sum of
    # the longest of each.
    assert len(steps) <= (sum(lengths) + 64) / 4 + max(lengths)
    assert len(steps) < sum(max(lengths[first : first + 4]) for first in range(0, 64, 4))


def test_several_samples_differ_and_the_first_is_the_same_as_with_one_sample(tiny):
    settings = config()
    task = load_task(settings.data, seed=0)
    questions = held_out(task, settings, tiny, 5)

    def texts(count, **evaluator):
        changed = config(evaluator=evaluator) if evaluator else settings
        answered = answer_problems(tiny, task, questions, changed, None, temperature=1.0, count=count)
        return [[one.text for one in problem.answers] for problem in answered]

    eight, one = texts(8), texts(1)
    assert [len(group) for group in eight] == [8] * 5
    assert [group[:1] for group in eight] == one
    assert len({text for group in eight for text in group}) > 20
    assert texts(8, eval_batch_size=3) == eight, "smaller batches than samples of a problem"


def test_an_answer_is_judged_as_the_task_judges_it(tiny):
    settings = config()
    task = load_task(settings.data, seed=0)
    [answered] = answer_problems(
        tiny, task, held_out(task, settings, tiny, 1), settings, None, temperature=1.0, count=16
    )
    for one in answered.answers:
        assert one.answer == task.answer_of(one.text)
        assert one.correct == (one.answer == answered.problem.answer)
        assert one.rewards == {}
    assert {one.correct for one in answered.answers} == {True, False}


def test_the_learner_can_receive_every_score(tiny):
    message = Evaluation(update=1, checkpoint="checkpoint-1", **asdict(scored(tiny, config())))
    assert message.samples == 16


# --- in a run -------------------------------------------------------------------------------------


class FakeControl:
    """The evaluator's end of a connection. It collects what is sent, and requests a stop when the evaluator waits."""

    name = "evaluator"

    def __init__(self, stop, answer=lambda: None):
        self.stop = stop
        #: Returns the next message of the learner; None: it has none.
        self.answer = answer
        self.messages = []
        self.evaluations = []
        self.unscored = []

    def send(self, data):
        message = decode(from_peer, data)
        if isinstance(message, Evaluation):
            self.evaluations.append(message)
        if isinstance(message, Unscored):
            self.unscored.append(message)
        return True

    def receive(self, wait_s):
        message = self.answer()
        if message is None:
            self.stop.set()
        return message


def follow(run_dir):
    stop = StopRequest()
    control = FakeControl(stop)
    RunEvaluator(run_dir, control, config(), stop, beat_s=1e9).run()
    return [(e.update, e.checkpoint) for e in control.evaluations], control.evaluations


def test_in_a_run_the_base_and_every_checkpoint_are_scored_once(run_dir, tiny):
    training = training_of(tiny)
    write_checkpoint(run_dir, 5, tiny, training, {})
    tiny.load_trainable({name: array * 0 for name, array in tiny.trainable().items()})
    write_checkpoint(run_dir, 10, tiny, training, {})
    reported, scores = follow(run_dir)
    assert reported == [(0, "base"), (5, "checkpoint-5"), (10, "checkpoint-10")]
    assert scores[0].accuracy == scores[1].accuracy, "checkpoint-5 is the base"
    assert scores[2].accuracy == 0.0, "a model of zeros solves nothing"
    again, same = follow(run_dir)
    assert (again, same) == (reported, scores), "read from the saved files, including the seconds"


def test_a_damaged_checkpoint_has_no_score_until_a_new_learner_writes_it_again(run_dir, tiny):
    training = training_of(tiny)
    folder = write_checkpoint(run_dir, 5, tiny, training, {}).path
    (folder / "model.safetensors").write_bytes(b"")
    (folder / EVALUATION_FILE).write_text(
        "{"
    )  # no score either: the checkpoint must be verified before it is scored

    def start_a_learner():
        """The evaluator has no more work: the learner is started again, and writes the checkpoint again."""
        if not control.messages:
            write_checkpoint(run_dir, 5, tiny, training, {})
            control.messages.append(encode(Bye(again=True)))
            return control.messages[0]
        return None

    stop = StopRequest()
    control = FakeControl(stop, start_a_learner)
    RunEvaluator(run_dir, control, config(), stop, beat_s=1e9).run()
    [unscored] = control.unscored
    assert (unscored.update, unscored.checkpoint) == (5, "checkpoint-5")
    assert "model.safetensors" in unscored.reason
    # The new learner does not know the score of the base model either; it is not computed again.
    assert [e.update for e in control.evaluations] == [0, 0, 5]
    assert control.evaluations[0] == control.evaluations[1]


def test_work_of_which_the_evaluator_died_repeatedly_is_given_up_and_the_rest_is_scored(
    run_dir, tiny, monkeypatch
):
    training = training_of(tiny)
    for update in (5, 10):
        write_checkpoint(run_dir, update, tiny, training, {})
    monkeypatch.setenv(GIVEN_UP, "base model\ncheckpoint-5")
    stop = StopRequest()
    control = FakeControl(stop)
    RunEvaluator(run_dir, control, config(), stop, beat_s=1e9).run()
    assert [(one.update, one.checkpoint) for one in control.unscored] == [(0, "base"), (5, "checkpoint-5")]
    assert [e.update for e in control.evaluations] == [10]
    assert not (run_dir / "checkpoint-5" / EVALUATION_FILE).exists()
