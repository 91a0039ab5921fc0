"""A reader knows which records it has read, also across a restart of the learner, which repeats numbers."""

from grpo_actors.observe.reading import Reading


def record(seq, session):
    return {"seq": seq, "time": 0.0, "topic": "log", "session": session}


def test_numbers_rise_within_a_session_and_a_session_that_has_ended_has_nothing_new():
    reading, taken = Reading(), []
    arriving = [("a", 1), ("a", 2), ("a", 2), ("a", 1), ("b", 2), ("a", 3), ("b", 2), ("b", 3), ("a", 9)]
    for session, seq in arriving:
        if reading.is_new(record(seq, session)):
            reading.mark(record(seq, session))
            taken.append((session, seq))
    assert taken == [("a", 1), ("a", 2), ("b", 2), ("b", 3)]
    assert (reading.seq, reading.sessions) == (3, ["a", "b"])


def test_records_without_a_session_are_of_one():
    reading = Reading()
    reading.mark({"seq": 1, "time": 0.0, "topic": "log"})
    assert not reading.is_new({"seq": 1, "time": 0.0, "topic": "log"})
    assert reading.is_new({"seq": 2, "time": 0.0, "topic": "log"})
