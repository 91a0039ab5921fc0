import os
import tempfile
import threading
from contextlib import closing, contextmanager
from statistics import fmean

import mlx.core as mx
import pytest
from bounds import HANG_S
from evaluated import config
from scores import report
from written import write_checkpoint

from grpo_actors import progress
from grpo_actors.config import LearnerConfig
from grpo_actors.errors import ConfigError, DataError
from grpo_actors.evaluator.following import RunEvaluator
from grpo_actors.evaluator.score import (
    answer_problems,
    by_source,
    evaluate,
    gain_over,
    held_out,
    measure_of,
)
from grpo_actors.policy.training import Training
from grpo_actors.policy.weights import freeze, pack
from grpo_actors.process import StopRequest
from grpo_actors.progress import GIVEN_UP, LOADING_S, LOST_S
from grpo_actors.rundir.claim import with_rewards
from grpo_actors.rundir.folder import EVALUATION_FILE
from grpo_actors.rundir.scores import SavedScore
from grpo_actors.tasks.registry import load_task, open_task
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.transport.weights import WeightsClient, WeightsServer
from grpo_actors.wire import fetching
from grpo_actors.wire.messages import Announcement, Bye, Evaluation, Unscored, decode, encode, from_peer


def training_of(policy):
    return Training(policy.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))


def scored(policy, settings):
    task = load_task(settings.data, seed=settings.run.seed)
    settings = with_rewards(settings, task)
    with closing(Scorer(settings.reward.functions, timeout_s=HANG_S)) as scorer:
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


def test_of_a_mixture_each_source_has_the_same_number_of_problems_and_its_own_score(tiny):
    sources = [{"name": name, "system_prompt": text} for name, text in (("a", "Hi"), ("b", "Ho"))]
    rewards = {"functions": {"correctness": 1.0}}
    settings = config(data={"task": "arithmetic", "sources": sources}, reward=rewards)
    questions = held_out(open_task(settings), settings, tiny, 7)
    named = [question.problem.source for question in questions]
    assert named == ["a"] * 4 + ["b"] * 4
    parts = by_source(named, [1.0, 1.0, 0.0, None, 2.0, 2.0, 2.0, 2.0])
    assert {name: part.value for name, part in parts.items()} == {"a": 2 / 3, "b": 2.0}
    assert by_source([""] * 2, [1.0, 0.0]) == {}


def test_problems_too_long_are_left_out_and_none_left_is_an_error(tiny):
    short = config(data={"task": "arithmetic", "max_prompt_length": 1})
    with pytest.raises(DataError, match="max_prompt_length"):
        held_out(load_task(short.data, seed=0), short, tiny)
    lengths = [
        len(question.prompt) for question in held_out(load_task(config().data, seed=0), config(), tiny)
    ]
    limit = min(lengths)
    assert limit < max(lengths)
    just = config(data={"task": "arithmetic", "max_prompt_length": limit})
    kept = held_out(load_task(just.data, seed=0), just, tiny)
    assert [len(question.prompt) for question in kept] == [limit] * lengths.count(limit)


# --- the score ------------------------------------------------------------------------------------


def test_a_score_is_the_same_every_time_and_for_every_batch_size(tiny):
    wide = scored(tiny, config())
    narrow = scored(
        tiny, config(evaluator={"eval_subset_size": 16, "eval_sampled": True, "eval_batch_size": 3})
    )
    assert wide.values == narrow.values
    wide, narrow = wide.report, narrow.report
    assert wide.model_dump(exclude={"seconds"}) == narrow.model_dump(exclude={"seconds"})
    assert wide.score.measure.problems == 16
    assert 0 <= wide.accuracy_low <= wide.accuracy <= wide.accuracy_high <= 1
    assert wide.sampled_accuracy == wide.score.value, "what was sampled decides"
    assert wide.rewards
    assert 0 < wide.seconds < HANG_S


def test_a_report_is_of_greedy_answers_and_of_those_sampled_at_the_given_temperature(tiny):
    settings = config(evaluator={"eval_subset_size": 16, "eval_sampled": True, "eval_temperature": 2.0})
    report = scored(tiny, settings).report
    task = load_task(settings.data, seed=0)
    greedy, sampled = (
        [
            one.answers[0]
            for one in answer_problems(
                *(tiny, task, held_out(task, settings, tiny), settings, None), temperature=temperature
            )
        ]
        for temperature in (0.0, 2.0)
    )
    assert report.accuracy == fmean(one.correct for one in greedy)
    assert report.completion_length_mean == fmean(one.tokens for one in greedy)
    assert report.truncated_share == fmean(one.truncated for one in greedy)
    assert report.sampled_accuracy == fmean(one.correct for one in sampled)
    assert report.completion_length_mean != fmean(one.tokens for one in sampled)


def test_the_gain_is_that_on_problems_that_have_both_values_measured_alike():
    base = SavedScore(report=report(), values=[0.0, 1.0, None, 0.5, None])
    other = base.model_copy(update={"values": [1.0, None, 0.5, 1.0, None]})
    assert gain_over(base, other).value == 0.75  # 1 and 0.5
    assert gain_over(base, base.model_copy(update={"values": [None] * 5})) is None
    measured = other.report.score.measure.model_copy(update={"temperature": 0.5})
    score = other.report.score.model_copy(update={"measure": measured})
    otherwise = other.report.model_copy(update={"score": score})
    assert gain_over(base, other.model_copy(update={"report": otherwise})) is None


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
        assert one.answer == task.answer_of(one.text, answered.problem)
        assert one.correct == (one.answer == answered.problem.answer)
        assert one.rewards == {}
    assert {one.correct for one in answered.answers} == {True, False}


def test_the_learner_can_receive_every_score(tiny):
    message = Evaluation(update=1, checkpoint="checkpoint-1", report=scored(tiny, config()).report)
    assert decode(from_peer, encode(message)) == message


def test_the_metric_decides_and_both_accuracy_and_reward_are_always_recorded(tiny):
    weights = {"functions": {"correctness": 1.0, "strict_format": 0.5, "integer": 0.0}}
    names = ("accuracy", "reward", "integer")
    accuracy, reward, integer = (
        scored(tiny, config(reward=weights, evaluator={"eval_subset_size": 16, "metric": name}))
        for name in names
    )
    for one in (accuracy, reward, integer):
        report = one.report
        by_hand = report.rewards["correctness"] + 0.5 * report.rewards["strict_format"]
        assert report.reward == pytest.approx(by_hand)
        assert report.accuracy == report.rewards["correctness"]
        assert (report.sampled_accuracy, report.sampled_reward) == (None, None)
    assert accuracy.report.score.value == accuracy.report.accuracy
    assert reward.report.score.value == reward.report.reward
    assert integer.report.score.value == integer.report.rewards["integer"]
    measures = [one.report.score.measure for one in (accuracy, reward, integer)]
    assert [measure.metric for measure in measures] == list(names)
    # A reward of weight 0 is not a part of the sum.
    assert [measure.weights for measure in measures] == [{}, {"correctness": 1.0, "strict_format": 0.5}, {}]


def test_a_measure_changes_with_all_that_changes_the_score(tiny):
    def measured(**sections):
        settings = config(**sections)
        task = load_task(settings.data, seed=settings.run.seed)
        settings = with_rewards(settings, task)
        return measure_of(held_out(task, settings, tiny), settings)

    plain = measured(evaluator={"eval_subset_size": 16})
    assert plain == measured(
        evaluator={"eval_subset_size": 16, "eval_batch_size": 2, "eval_temperature": 2.0}
    )
    assert (plain.problems, plain.temperature, plain.max_new_tokens) == (16, 0.0, 40)
    for change, says in (
        ({"eval_subset_size": 17}, "problems 16 → 17"),
        ({"eval_sampled": True, "eval_temperature": 0.5}, "temperature 0.0 → 0.5"),
        ({"eval_max_new_tokens": 20}, "max_new_tokens 40 → 20"),
        ({"metric": "reward"}, "metric accuracy → reward"),
    ):
        other = measured(evaluator={"eval_subset_size": 16} | change)
        assert says in plain.changes(other)
    other = measured(evaluator={"eval_subset_size": 16}, data={"task": "arithmetic", "system_prompt": "Hi"})
    assert plain.changes(other) == f"digest {plain.digest} → {other.digest}"


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
        #: Whether the evaluator waits for a message, or only takes what has arrived.
        self.waits = wait_s > 0
        message = self.answer()
        if message is None and self.waits:
            self.stop.set()
        return message


def follow(run_dir, settings=None):
    stop = StopRequest()
    control = FakeControl(stop)
    RunEvaluator(run_dir, control, settings or config(), stop, beat_s=1e9).run()
    return [(e.update, e.checkpoint) for e in control.evaluations], control.evaluations


def test_in_a_run_the_base_and_every_checkpoint_are_scored_once(run_dir, tiny):
    training = training_of(tiny)
    write_checkpoint(run_dir, 5, tiny, training, {})
    tiny.load_trainable({name: array * 0 for name, array in tiny.trainable().items()})
    write_checkpoint(run_dir, 10, tiny, training, {})
    reported, scores = follow(run_dir)
    assert reported == [(0, "base"), (5, "checkpoint-5"), (10, "checkpoint-10")]
    base, same, zeros = (score.report for score in scores)
    assert base.score == same.score, "checkpoint-5 is the base"
    assert zeros.score.value == 0.0, "a model of zeros solves nothing"
    assert [one.gain and one.gain.value for one in (base, same, zeros)] == [None, 0.0, -base.score.value]
    again, same = follow(run_dir)
    assert (again, same) == (reported, scores), "read from the saved files, including the seconds"


@contextmanager
def served(version, arrays):
    """A source of weights that has this version."""
    over = threading.Event()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, zmq_context() as context:
        server = WeightsServer(context, f"ipc://{folder}/w", fetching)
        manifest, data = pack(freeze(version, arrays), 2**20)
        server.publish(version, encode(manifest), data, manifest.chunk_bytes)

        def serve():
            while not over.is_set():
                if server.socket.poll(10):
                    server.serve()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield WeightsClient(context, f"ipc://{folder}/w", fetching)
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(
    ("newest", "ahead"), [(10, True), (11, False)], ids=["it is fetched", "another has replaced it"]
)
def test_a_version_is_scored_while_its_checkpoint_is_written(run_dir, tiny, newest, ahead, monkeypatch):
    read_end, write_end = os.pipe()
    monkeypatch.setenv(progress.PROGRESS, str(write_end))
    monkeypatch.setattr(progress, "_reporter", progress._Reporter())
    training, zeros = training_of(tiny), {name: array * 0 for name, array in tiny.trainable().items()}

    def write():
        """The checkpoint of update 10: of the base's weights, which the score shows if it is read."""
        write_checkpoint(run_dir, 10, tiny, training, {})
        return Announcement(version=11)

    script = iter([lambda: Announcement(version=9), lambda: Announcement(version=10), write])

    def messages():
        # All messages that are there are handled at once: here it is one at a time.
        step = next(script, None) if control.waits else None
        return None if step is None else encode(step())

    stop = StopRequest()
    control = FakeControl(stop, messages)
    settings = config(evaluator={"eval_every_updates": 10, "eval_subset_size": 16})
    with served(newest, zeros) as weights:
        RunEvaluator(run_dir, control, settings, stop, beat_s=1e9, weights=weights).run()
    base, scored = control.evaluations
    assert (scored.update, scored.checkpoint, control.unscored) == (10, "checkpoint-10", [])
    assert scored.report.score.value == (0.0 if ahead else base.report.score.value)
    assert (run_dir / "checkpoint-10" / EVALUATION_FILE).is_file()
    os.close(write_end)
    with os.fdopen(read_end) as told:
        works = list(dict.fromkeys(told.read().splitlines()))
    # Only the first step of a score may load and compile, whether it reads the checkpoint or not.
    each = [
        f"{patience_s} {work}"
        for work in ("base model", "checkpoint-10")
        for patience_s in (LOADING_S, LOST_S)
    ]
    assert works == [*each[:2], f"{LOST_S} ", *each[2:]]


def test_after_a_change_of_what_is_measured_the_base_and_all_checkpoints_are_scored_again(run_dir, tiny):
    training = training_of(tiny)
    write_checkpoint(run_dir, 5, tiny, training, {})
    _, sampled = follow(run_dir)
    reported, greedy = follow(run_dir, config(evaluator={"eval_subset_size": 16}))
    assert reported == [(0, "base"), (5, "checkpoint-5")]
    before, after = ([one.report.score.measure.temperature for one in scores] for scores in (sampled, greedy))
    assert (before, after) == ([1.0, 1.0], [0.0, 0.0])
    assert greedy[1].report.gain.value == 0.0


def test_a_metric_that_applies_to_no_answer_gives_no_score_and_says_so(run_dir, tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def never(completions, **columns):\n    return [None] * len(completions)\n"
    )
    own = {"functions": {"correctness": 1.0, f"{tmp_path}/mine.py:never": 0.0}}
    chosen = {"eval_subset_size": 2, "metric": f"{tmp_path}/mine.py:never"}
    stop = StopRequest()
    control = FakeControl(stop)
    RunEvaluator(run_dir, control, config(reward=own, evaluator=chosen), stop, beat_s=1e9).run()
    [unscored] = control.unscored
    assert unscored.reason.endswith("mine.py:never applies to none of 2 held-out answers")


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
