"""Messages and their bytes: round trips, bounds, and the input of hostile or broken peers."""

import math
import random
import struct
import tracemalloc

import msgpack
import pytest
from example_messages import (
    BEAT,
    EVALUATION,
    EXAMPLES,
    HELLO,
    LEASE,
    MANIFEST,
    WELCOME,
    completion,
    group,
    mutated,
)
from pydantic import ValidationError
from scores import report

from grpo_actors.errors import ProtocolError
from grpo_actors.wire import codec
from grpo_actors.wire import messages as wire

ADAPTERS = (wire.from_peer, wire.from_learner, wire.weights_request, wire.weights_reply)


def short(value: object) -> str:
    """Return a test's name made from its parameter."""
    return str(value)[:40]


KINDS = [example["kind"] for _, example in EXAMPLES]


@pytest.mark.parametrize(("adapter", "example"), EXAMPLES, ids=KINDS)
def test_every_message_survives_the_wire(adapter, example):
    message = adapter.validate_python(example)
    assert wire.decode(adapter, wire.encode(message)) == message


@pytest.mark.parametrize("bounds", [[], [1, 2]])
def test_a_completion_carries_its_environment_spans(bounds):
    sent = group(completions=[completion(inserted=wire.ints(bounds))])
    received = wire.decode(wire.from_peer, wire.encode(wire.from_peer.validate_python(sent)))
    assert wire.read_ints(received.completions[0].inserted) == bounds


@pytest.mark.parametrize(
    "bounds",
    # Before the first turn, to the end, empty, backwards, outside, touching, half a pair.
    [[0, 1], [1, 3], [1, 1], [2, 1], [-1, 2], [1, 9], [1, 2, 2, 3], [1]],
)
def test_impossible_environment_spans_are_refused(bounds):
    sent = group(completions=[completion(inserted=wire.ints(bounds))])
    with pytest.raises(ProtocolError, match="inserted must"):
        wire.decode(wire.from_peer, msgpack.packb(sent))


@pytest.mark.parametrize(("adapter", "example"), EXAMPLES, ids=KINDS)
def test_an_unknown_field_is_refused_by_name(adapter, example):
    with pytest.raises(ProtocolError, match="surprise"):
        wire.decode(adapter, msgpack.packb({**example, "surprise": 1}))


@pytest.mark.parametrize(("adapter", "example"), EXAMPLES, ids=KINDS)
def test_every_field_refuses_a_value_of_another_type(adapter, example):
    for name in example:
        for wrong in (object, [[]], -(2**62)):
            value = {"no": ["such"]} if wrong is object else wrong
            with pytest.raises(ProtocolError):
                wire.decode(adapter, msgpack.packb({**example, name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"lease": -1},
        {"lease": 2**53 + 1},
        {"lease": True},
        {"lease": 1.0},
        {"attempt": 0},
        {"token": -1},
        {"sampling_s": float("nan")},
        {"sampling_s": float("inf")},
        {"sampling_s": -0.1},
        {"completions": []},
        {"completions": [completion()] * (wire.MAX_COMPLETIONS + 1)},
        {"completions": [completion(tokens=b"")]},
        {"completions": [completion(tokens=b"", logprobs=b"", versions=b"")]},
        {"completions": [completion(tokens=b"12345678", logprobs=b"1234", versions=b"12345678")]},
        {"completions": [completion(tokens=b"12345678", logprobs=b"12345678", versions=b"1234")]},
        {"completions": [completion(tokens=b"123")]},
        {"completions": [completion(tokens=wire.ints([1, 2]))]},
        {"completions": [completion(versions=wire.ints([1, 2, 3, 4]))]},
        {"completions": [completion(logprobs=wire.floats([0.0, float("nan"), 0.0]))]},
        {"completions": [completion(logprobs=wire.floats([0.0, float("-inf"), 0.0]))]},
        {"completions": [completion(logprobs=wire.floats([float("inf"), float("-inf"), 0.0]))]},
        {"completions": [completion(text="4")]},
        {"completions": [completion(tokens="abc")]},
        {"completions": [completion(finished=1)]},
        {"completions": [completion(rewards={"correct": float("nan")})]},
        {"completions": [completion(rewards={"correct": "1"})]},
        {"completions": [completion(rewards={f"r{i}": 0.0 for i in range(65)})]},
        {"completions": [completion(rewards={"x" * 5001: 0.0})]},
        {"completions": [completion(extra={"column": "x" * 1001})]},
        {"completions": [completion(extra={"x" * 201: 1})]},
        {"failures": {str(i): "x" for i in range(66)}},
    ],
    ids=short,
)
def test_a_group_out_of_bounds_is_refused(changes):
    with pytest.raises(ProtocolError):
        wire.decode(wire.from_peer, msgpack.packb(group(**changes)))


@pytest.mark.parametrize(
    ("adapter", "example", "changes"),
    [
        (wire.from_peer, HELLO, {"pid": 0}),
        (wire.from_peer, HELLO, {"pid": 2**31}),  # more than a process number can be: os.kill would overflow
        (wire.from_peer, HELLO, {"name": "x" * 201}),
        (wire.from_peer, HELLO, {"host": "x" * 201}),
        (wire.from_peer, HELLO, {"role": "learner"}),
        (wire.from_peer, BEAT, {"version": -2}),
        (wire.from_peer, BEAT, {"state": "idle"}),
        (wire.from_peer, BEAT, {"waiting_s": -0.1}),
        (wire.from_peer, BEAT, {"working_s": math.nextafter(3e9, math.inf)}),
        (wire.from_peer, BEAT, {"working_s": float("inf")}),
        (wire.from_peer, BEAT, {"holding": list(range(10_001))}),
        (wire.from_peer, EVALUATION, {"report": report().model_dump() | {"accuracy": 1.01}}),
        (wire.from_peer, EVALUATION, {"report": report().model_dump() | {"accuracy": float("nan")}}),
        (wire.from_learner, {"kind": "grant"}, {"leases": []}),
        (wire.from_learner, {"kind": "grant"}, {"leases": [{**LEASE, "seeds": [2**64 - 1, -1]}]}),
        (wire.from_learner, {"kind": "grant"}, {"leases": [{**LEASE, "columns": "{"}]}),
        (wire.weights_reply, MANIFEST, {"digest": "0" * 31 + "G"}),
        (wire.weights_reply, MANIFEST, {"chunk_bytes": 0}),
        (wire.weights_reply, MANIFEST, {"chunk_bytes": 2**22 + 1}),
        (wire.weights_reply, MANIFEST, {"tensors": [{**MANIFEST["tensors"][0], "dtype": "float64"}]}),
        (wire.weights_reply, MANIFEST, {"tensors": [{**MANIFEST["tensors"][0], "shape": [1] * 9}]}),
    ],
    ids=short,
)
def test_a_value_out_of_bounds_is_refused(adapter, example, changes):
    with pytest.raises(ProtocolError):
        wire.decode(adapter, msgpack.packb({**example, **changes}))


@pytest.mark.parametrize(
    ("adapter", "example"),
    [
        (wire.from_peer, HELLO | {"protocol": 0, "host": "x" * 200, "pid": 2**31 - 1}),
        (wire.from_peer, group(token=0, lease=2**53, sampling_s=0.0, failures={}, logged={})),
        (wire.from_peer, group(completions=[completion(extra={"x" * 200: "x" * 1000})])),
        (wire.from_peer, BEAT | {"working_s": 3e9, "waiting_s": 0.0, "holding": [0, 2**53]}),
    ],
    ids=short,
)
def test_a_value_at_its_bound_is_accepted(adapter, example):
    wire.decode(adapter, msgpack.packb(example))


@pytest.mark.parametrize("changes", [{"seeds": [2**64]}, {"token": 2**64}], ids=short)
def test_seeds_and_tokens_have_64_bits(changes):
    with pytest.raises(ValidationError, match="less than 18446744073709551616"):
        wire.Lease.model_validate(LEASE | changes)


def test_bytes_that_are_no_whole_tokens_are_named():
    with pytest.raises(ProtocolError, match="tokens must hold at least one int32, got 3 bytes"):
        wire.decode(
            wire.from_peer,
            msgpack.packb(group(completions=[completion(tokens=b"123", logprobs=b"123", versions=b"123")])),
        )


@pytest.mark.parametrize(
    ("message", "defaults"),
    [
        (
            wire.Hello(protocol=1, role="rollout", name="w", host="h", pid=1),
            {"device": "", "run_id": "", "token": ""},
        ),
        (wire.Completion.model_validate(completion()), {"inserted": b"", "forced": b"", "extra": {}}),
        (
            wire.Beat(state="waiting"),
            # It holds no version; version 0 is one.
            {"version": -1, "tokens": 0, "working_s": 0, "waiting_s": 0, "peak_bytes": 0}
            | {"credits": 0, "holding": []},
        ),
        (wire.Bye(), {"reason": "", "again": False, "dismissed": False}),
        (wire.Welcome.model_validate(WELCOME), {"total_updates": 0}),
        (
            wire.Lease.model_validate(LEASE),
            {"text_prompt": False, "mathematics": False, "epoch": 0, "source": ""},
        ),
        (wire.Ack(lease=1, attempt=1, accepted=True), {"reason": ""}),
        (wire.Manifest.model_validate(MANIFEST), {"path": ""}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_field_that_is_not_sent_claims_nothing(message, defaults):
    left_out = message.model_fields_set ^ set(type(message).model_fields)
    assert message.model_dump(include=left_out - {"kind"}) == defaults


def test_a_message_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        wire.Beat(state="waiting").tokens = 1


def test_of_several_errors_the_first_is_named():
    spoiled = {"kind": "beat", "state": "idle", "version": -2, "tokens": -1}
    with pytest.raises(ProtocolError, match=r"^message refused: beat\.state: Input should be 'sampling'"):
        wire.decode(wire.from_peer, msgpack.packb(spoiled))


def test_a_message_of_the_other_direction_is_refused():
    with pytest.raises(ProtocolError):
        wire.decode(wire.from_peer, msgpack.packb(WELCOME))
    with pytest.raises(ProtocolError):
        wire.decode(wire.from_learner, msgpack.packb(group()))


def test_the_sender_is_held_to_the_same_bounds():
    with pytest.raises(ValidationError):
        wire.Beat.model_validate({**BEAT, "tokens": float("nan")})


def test_arrays_are_little_endian_32_bit_values():
    assert wire.ints([1, -2]) == struct.pack("<2i", 1, -2)
    assert wire.floats([0.5, -1.0]) == struct.pack("<2f", 0.5, -1.0)
    assert wire.read_ints(wire.ints([1, -2, 2**31 - 1])) == [1, -2, 2**31 - 1]
    assert wire.read_floats(wire.floats([0.5, -1.25])) == [0.5, -1.25]


def peak_mib(data: bytes) -> float:
    """Return the peak memory that refusing `data` takes, beyond the data, in MiB."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            wire.decode(wire.from_peer, data)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


BOMBS = {
    "ten megabytes of empty maps": b"\xdd" + struct.pack(">I", 10**7) + b"\x80" * 10**7,
    "nested lists of empty maps": (b"\xdc\x27\x10" + b"\x80" * 9999) * 1000 + b"\x80",
    "a list that claims 4 G values": b"\xdd\xff\xff\xff\xff",
    "a map that claims 4 G entries": b"\xdf\xff\xff\xff\xff",
    "bytes that claim 4 GiB": b"\xc6\xff\xff\xff\xff" + b"x" * 100,
    "a text that claims 4 GiB": b"\xdb\xff\xff\xff\xff" + b"x" * 100,
    "a text of 5 MB": b"\xdb" + struct.pack(">I", 5 * 10**6) + b"x" * 5 * 10**6,
    "a hundred thousand lists in lists": b"\x91" * 100_000 + b"\xc0",
    "a hundred thousand maps in maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "lists twenty deep, short enough": msgpack.packb(
        {**BEAT, "holding": [[[[[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]]]]]}
    ),
    "lists that each claim 65535 values": b"\xdc\xff\xff" * 1000,
    "five million small texts": b"\xdd" + struct.pack(">I", 5 * 10**6) + b"\xa2ab" * 5 * 10**6,
    "an extension type": b"\xc7\x08\x01" + b"x" * 8,
    "a time stamp": b"\xd6\xff" + b"x" * 4,
    "a byte that MessagePack never uses": b"\xc1",
    "nothing": b"",
    "a message and a half": msgpack.packb(BEAT) + b"\xc0",
    "a text that is no UTF-8": b"\xa2\xff\xfe",
    "a list as key": b"\x81\x90\xc0",
    "ten thousand unknown fields": msgpack.packb({f"{i:06}": i for i in range(10_000)}),
    "a field name of 4 MB": msgpack.packb({**BEAT, "x" * 4_000_000: 1}),
    "ten thousand wrong entries": msgpack.packb({**BEAT, "holding": ["x"] * 10_000}),
}


#: A list that claims more values than are allowed: refused as soon as it is measured.
TOO_LONG = b"\xdd\xff\xff\xff\xff"
#: One value of each form that MessagePack has, behind its first byte: the bomb begins where its bytes end.
FORMS = {
    "nil": b"\xc0",
    "bool": b"\xc3",
    "fixint": b"\x05",
    "largest fixint": b"\x7f",
    "negative fixint": b"\xe0",
    "largest negative fixint": b"\xff",
    # float 32 and 64, then uint 8 to 64, then int 8 to 64.
    **{
        f"scalar {0xCA + at:#x}": bytes([0xCA + at]) + bytes(size)
        for at, size in enumerate((4, 8, 1, 2, 4, 8, 1, 2, 4, 8))
    },
    "fixstr": b"\xa3abc",
    "longest fixstr": b"\xbf" + b"x" * 31,
    "str 8": b"\xd9\x03abc",
    "str 16": b"\xda\x00\x03abc",
    "str 32": b"\xdb\x00\x00\x00\x03abc",
    "bin 8": b"\xc4\x03abc",
    "bin 16": b"\xc5\x00\x03abc",
    "bin 32": b"\xc6\x00\x00\x00\x03abc",
    "fixarray": b"\x92\xc0\xc0",
    "longest fixarray": b"\x9f" + b"\xc0" * 15,
    "array 16": b"\xdc\x00\x02\xc0\xc0",
    "array 32": b"\xdd\x00\x00\x00\x02\xc0\xc0",
    "fixmap": b"\x82\xa1a\xc0\xa1b\xc0",
    "longest fixmap": b"\x8f" + b"\xa1a\xc0" * 15,
    "map 16": b"\xde\x00\x02\xa1a\xc0\xa1b\xc0",
    "map 32": b"\xdf\x00\x00\x00\x02\xa1a\xc0\xa1b\xc0",
}
#: What a value may be packed into: the entry of a map or list of each width.
AROUND = [
    b"\x81\xa1x",
    b"\xde\x00\x01\xa1x",
    b"\xdf\x00\x00\x00\x01\xa1x",
    b"\x91",
    b"\xdc\x00\x01",
    b"\xdd\x00\x00\x00\x01",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_measured_as_long_as_it_is(form):
    codec._measure(b"\x92" + FORMS[form] + b"\xc0")
    for end in range(1, len(FORMS[form])):  # of a list that ends too early, in whatever value
        with pytest.raises(ValueError, match="cut off"):
            codec._measure(b"\x92" + FORMS[form][:end])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", [b"", *AROUND])
def test_a_value_behind_or_within_any_other_is_measured_too(form, around):
    for list_or_map in (b"\x92", b"\x82\xa1a"):
        key = b"" if list_or_map == b"\x92" else b"\xa1b"
        with pytest.raises(ValueError, match="more than"):
            codec._measure(list_or_map + FORMS[form] + key + around + TOO_LONG)


def test_a_large_group_of_long_completions_with_realistic_ids_survives_the_wire():
    tokens = 20_000  # more than 65,535 bytes: the widest length field
    ids = [(7919 * at) % 151_936 for at in range(tokens)]
    one = completion(
        tokens=wire.ints(ids),
        logprobs=wire.floats([-(at % 977) / 64 for at in range(tokens)]),
        versions=wire.ints([3 + at // 10_000 for at in range(tokens)]),
    )
    message = wire.from_peer.validate_python(group(completions=[one] * 64))
    received = wire.decode(wire.from_peer, wire.encode(message))
    assert received == message
    assert wire.read_ints(received.completions[-1].tokens) == ids


def test_as_many_values_as_are_allowed_are_measured_and_one_more_is_refused():
    widest = b"\xdd" + struct.pack(">I", codec.MAX_ITEMS - 1) + b"\xc0" * (codec.MAX_ITEMS - 1)
    codec._measure(widest)  # with the list itself
    with pytest.raises(ValueError, match="more than"):
        codec._measure(b"\xdd" + struct.pack(">I", codec.MAX_ITEMS) + b"\xc0" * codec.MAX_ITEMS)


@pytest.mark.parametrize("empty", [b"\x80", b"\x90"], ids=["map", "list"])
def test_values_may_lie_as_deep_as_is_allowed_and_no_deeper(empty):
    lists = b"\x91" * (codec.MAX_DEPTH - 2)  # the message itself is on level 1
    codec._measure(lists + empty)
    with pytest.raises(ValueError, match="nested deeper than"):
        codec._measure(b"\x91" + lists + empty)


@pytest.mark.parametrize("head", [0xC1, 0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)], ids=hex)
def test_a_type_that_is_not_used_is_named(head):
    with pytest.raises(ProtocolError, match=f"type {head:#x} is not used here"):
        wire.decode(wire.from_peer, bytes([head]) + bytes(20))


def test_the_largest_message_is_measured():
    codec._measure(bytes(codec.MAX_MESSAGE_BYTES))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_within_50_mib(bomb):
    assert peak_mib(BOMBS[bomb]) < 50


def test_a_message_above_64_mib_is_refused_unread():
    assert peak_mib(bytes(codec.MAX_MESSAGE_BYTES + 1)) < 1


def test_an_error_is_one_short_line():
    with pytest.raises(ProtocolError) as refused:
        wire.decode(wire.from_peer, BOMBS["a field name of 4 MB"])
    assert len(str(refused.value)) < 1000


# --- fuzz -----------------------------------------------------------------------------------------


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """Return (messages accepted, messages refused); any other error than ProtocolError fails the test."""
    chance = random.Random(seed)
    accepted = refused = 0
    for _ in range(count):
        data = mutated(chance)
        for adapter in ADAPTERS:
            try:
                message = wire.decode(adapter, data)
            except ProtocolError:
                refused += 1
            else:
                # An accepted message fits the schema, so it can be encoded again.
                assert wire.decode(adapter, wire.encode(message)) == message
                accepted += 1
    return accepted, refused


def test_mutated_messages_are_accepted_whole_or_refused():
    accepted, refused = fuzz(3_000, seed=1)
    # Most are broken, and some mutations (a changed digit, a flipped bit of a text) are not.
    assert refused > 10_000
    assert accepted > 20
