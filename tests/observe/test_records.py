"""One record, one line."""

import json

import pytest

from grpo_actors.errors import ProtocolError
from grpo_actors.observe.records import (
    FIELDS,
    PUBLIC_TEXTS,
    WITHHELD,
    decode,
    encode,
    make_record,
    numbers_only,
)


@pytest.mark.parametrize("topic", FIELDS)
def test_a_record_has_all_keys_of_its_topic_in_order_measured_or_not(topic):
    assert list(make_record(1, 2.0, topic, {})) == ["seq", "time", "topic", *FIELDS[topic]]


def test_the_order_of_the_callers_fields_does_not_matter():
    one = make_record(1, 2.0, "eval", {"accuracy": 0.5, "update": 3, "z": 1, "a": 2})
    other = make_record(1, 2.0, "eval", {"a": 2, "z": 1, "update": 3, "accuracy": 0.5})
    assert encode(one) == encode(other)


def test_a_record_survives_the_round_trip():
    record = make_record(7, 1.5, "log", {"level": "info", "text": "π\u2028 \x1b[31m \ud800"})
    assert encode(record).isascii()
    assert len(encode(record).splitlines()) == 1
    assert decode(encode(record)) == record


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b'{"seq":0,"time":1.0,"topic":"log"}',
        b'{"seq":true,"time":1.0,"topic":"log"}',
        b'{"seq":1,"time":NaN,"topic":"log"}',
        b'{"seq":1,"time":1e999,"topic":"log"}',
        b'{"seq":9007199254740992,"time":1.0,"topic":"log"}',  # 2^53
        b'{"seq":1,"time":1e12,"topic":"log"}',
        b'{"seq":1,"time":-1e12,"topic":"log"}',
        b'{"seq":1,"time":1.0,"topic":3}',
        b'{"seq":1,"time":1.0,"topic":"log","text":' + b"[" * 100_000,
    ],
)
def test_a_line_that_is_not_a_record_is_rejected(line):
    with pytest.raises(ProtocolError, match="a record must"):
        decode(line)


def test_the_largest_number_and_time_are_those_of_a_record():
    record = {"seq": 2**53 - 1, "time": 999_999_999_999, "topic": "log"}
    assert decode(encode(record)) == record


def test_a_topic_without_a_schema_is_the_callers_error():
    with pytest.raises(ValueError, match="no such topic: 'news'; topics are start, "):
        make_record(1, 2.0, "news", {})


def test_a_value_that_is_not_json_is_the_callers_error():
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode({"seq": 1, "time": 2.0, "topic": "log", "text": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        encode(make_record(1, 2.0, "log", {"text": {1, 2}}))


def test_lists_and_tuples_are_searched_for_non_finite_numbers():
    record = make_record(1, 2.0, "sample", {"completions": [{"reward": 1.0}, {"reward": float("-inf")}]})
    assert record["completions"] == [{"reward": 1.0}, {"reward": None}]
    assert record["nonfinite"] == ["completions.1.reward"]
    json.loads(encode(record))


def test_for_other_hosts_only_the_numbers_of_a_record_are_left():
    sample = {
        "update": 3,
        "problem": "p1",
        "prompt": "secret",
        "answer": "secret",
        "completions": [{"text": "secret", "reward": 1.0, "rewards": {"correct": 1.0}, "truncated": False}],
    }
    line = numbers_only(encode(make_record(7, 1.5, "sample", sample)))
    assert b"secret" not in line
    record = decode(line)
    assert (record["seq"], record["time"], record["topic"], record["update"]) == (7, 1.5, "sample", 3)
    assert record["prompt"] == WITHHELD
    (completion,) = record["completions"]
    assert completion == {"text": WITHHELD, "reward": 1.0, "rewards": {"correct": 1.0}, "truncated": False}


@pytest.mark.parametrize("topic", FIELDS)
def test_for_other_hosts_no_topic_keeps_a_free_text(topic):
    fields = dict.fromkeys(FIELDS[topic], "public")
    secret = {name for name in FIELDS[topic] if name not in PUBLIC_TEXTS.get(topic, ())}
    record = decode(numbers_only(encode(make_record(1, 0.0, topic, fields | {"more": ["x", {"y": "z"}]}))))
    assert {name for name in FIELDS[topic] if record[name] == WITHHELD} == secret
    assert record["more"] == [WITHHELD, {"y": WITHHELD}]
    assert secret >= {"text", "reason"} & FIELDS[topic].keys() - (
        {"reason"} if topic == "headcount" else set()
    )


def test_for_other_hosts_the_numbers_of_an_update_stay():
    fields = {"update": 1, "loss": 0.5, "rewards": {"correct": 0.25}, "staleness": {"0": 2}}
    line = encode(make_record(1, 0.0, "metrics", fields))
    assert decode(numbers_only(line)) == decode(line)
