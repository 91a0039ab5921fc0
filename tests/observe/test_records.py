"""One record, one line."""

import json

import pytest

from grpo_actors.errors import ProtocolError
from grpo_actors.observe.records import FIELDS, decode, encode, make_record


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
        b'{"seq":1,"time":1.0,"topic":3}',
        b'{"seq":1,"time":1.0,"topic":"log","text":' + b"[" * 100_000,
    ],
)
def test_a_line_that_is_not_a_record_is_rejected(line):
    with pytest.raises(ProtocolError, match="a record must"):
        decode(line)


def test_a_value_that_is_not_json_is_the_callers_error():
    with pytest.raises(TypeError, match="not JSON serializable"):
        encode(make_record(1, 2.0, "log", {"text": {1, 2}}))


def test_lists_and_tuples_are_searched_for_non_finite_numbers():
    record = make_record(1, 2.0, "sample", {"completions": [{"reward": 1.0}, {"reward": float("-inf")}]})
    assert record["completions"] == [{"reward": 1.0}, {"reward": None}]
    assert record["nonfinite"] == ["completions.1.reward"]
    json.loads(encode(record))
