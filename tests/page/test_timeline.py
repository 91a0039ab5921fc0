"""The timeline: spans of the actors, from records."""

from typing import Any

from grpo_actors.page.timeline import UPDATES_SHOWN, Timeline, memory_of


def record(topic: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"seq": 1, "time": time, "topic": topic, **fields}


def update(number: int, end: float, **fields: Any) -> dict[str, Any]:
    return record("metrics", end, update=number, update_s=10.0, wait_s=4.0, rollout_wait_share=0.25, **fields)


def test_the_learner_waits_then_trains_and_a_worker_samples_then_waits():
    timeline = Timeline()
    timeline.apply(record("worker", 0.0, worker="w", role="rollout", state="joined"))
    timeline.apply(update(1, 110.0))
    spans = {(s.actor, s.doing): (s.begin, s.end) for s in timeline.spans()}
    # The update lasts from 100 to 110: 4 s of waiting come first. The worker waits for a quarter of it.
    assert spans == {
        ("learner", "waits"): (100, 104),
        ("learner", "trains"): (104, 110),
        ("w", "samples"): (100, 107.5),
        ("w", "waits"): (107.5, 110),
    }
    assert [s.what for s in timeline.spans()] == [
        *("for groups of the workers", "update 1"),
        *("groups, during update 1", "for the learner, 25% of update 1"),
    ]


def test_a_worker_has_no_spans_before_it_joined_and_after_it_left():
    timeline = Timeline()
    timeline.apply(record("worker", 106.0, worker="w", role="rollout", state="joined"))
    timeline.apply(update(1, 110.0))
    timeline.apply(record("worker", 112.0, worker="w", role="rollout", state="left"))
    timeline.apply(update(2, 120.0))
    assert [(s.begin, s.end) for s in timeline.spans() if s.actor == "w"] == [(106, 109), (109, 110)]


def test_a_worker_that_joined_just_before_an_update_ended_waited_for_its_share_of_that():
    timeline = Timeline()
    timeline.apply(record("worker", 109.5, worker="w", role="rollout", state="joined"))
    timeline.apply(update(1, 110.0))
    # A quarter of half a second.
    assert [(s.begin, s.end) for s in timeline.spans() if s.actor == "w"] == [
        (109.5, 109.875),
        (109.875, 110),
    ]


def test_evaluations_and_checkpoints_have_lanes_of_their_own_below_the_workers():
    timeline = Timeline()
    timeline.apply(record("worker", 0.0, worker="w", role="rollout", state="joined"))
    timeline.apply(update(1, 110.0))
    timeline.apply(record("eval", 120.0, seconds=8.0, checkpoint="base"))
    timeline.apply(record("checkpoint", 121.0, update=1, write_s=0.5))
    assert timeline.actors() == ["learner", "w", "evaluator", "checkpoints"]
    assert [tuple(s) for s in timeline.spans()[-2:]] == [
        ("evaluator", "evaluates", 112.0, 120.0, "base"),
        ("checkpoints", "writes", 120.5, 121.0, "checkpoint-1"),
    ]


def test_only_the_newest_updates_are_shown():
    timeline = Timeline()
    for number in range(1, 301):
        timeline.apply(update(number, 10.0 * number))
    spans = timeline.spans()
    assert len(spans) == 2 * UPDATES_SHOWN
    assert spans[0].begin == 10.0 * (300 - UPDATES_SHOWN)


def test_what_took_no_time_has_no_span_and_the_evaluator_is_no_worker():
    timeline = Timeline()
    for name in ("evaluator", "rollout"):
        timeline.apply(record("worker", 0.0, worker=name, role=name, state="joined"))
    timeline.apply(record("metrics", 110.0, update=1, update_s=10.0, wait_s=0.0, rollout_wait_share=0.0))
    spans = [(s.actor, s.doing, s.begin, s.end) for s in timeline.spans()]
    assert spans == [("learner", "trains", 100, 110), ("rollout", "samples", 100, 110)]


def test_a_worker_whose_waits_were_not_measured_samples_all_the_time():
    timeline = Timeline()
    timeline.apply(record("worker", 0.0, worker="w", role="rollout", state="joined"))
    timeline.apply(record("metrics", 110.0, update=1, update_s=10.0))
    assert [(s.doing, s.begin, s.end) for s in timeline.spans() if s.actor == "w"] == [("samples", 100, 110)]


def test_what_was_not_measured_has_no_span_nor_has_a_worker_before_it_joined():
    timeline = Timeline()
    timeline.apply(record("worker", 200.0, worker="w", role="rollout", state="joined"))
    timeline.apply(record("metrics", 110.0, update=1, rollout_wait_share=0.5))
    timeline.apply(record("eval", 120.0, checkpoint="base"))
    timeline.apply(record("checkpoint", 121.0, update=1))
    assert timeline.spans() == []


def test_workers_of_a_run_that_starts_again_have_to_join_again():
    timeline = Timeline()
    timeline.apply(record("worker", 0.0, worker="w", role="rollout", state="joined"))
    timeline.apply(record("start", 100.0))
    timeline.apply(update(1, 110.0))
    assert timeline.actors() == ["learner"]
    timeline.apply(record("worker", 112.0, worker="w", role="rollout", state="sampling"))
    timeline.apply(record("worker", 119.0, worker="w", role="rollout", state="waiting"))
    timeline.apply(update(2, 120.0))
    assert [(s.begin, s.end) for s in timeline.spans() if s.actor == "w"] == [(112, 118), (118, 120)]


def test_memory_is_that_of_each_actor_that_has_measured_it():
    both = record("metrics", 1.0, memory_gb=1.5, peers_memory_gb={"w": 0.5, "other": None})
    assert memory_of(both) == {"learner": 1.5, "w": 0.5}
    assert memory_of(record("metrics", 1.0)) == {}
