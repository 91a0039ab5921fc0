"""One message of every kind, and mutations of them, for tests of all that decodes messages."""

import json
import random
from typing import Any

import msgpack
from pydantic import TypeAdapter
from scores import report

from grpo_actors.wire import messages as wire


def completion(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": wire.ints([1, 2, 3]),
        "logprobs": wire.floats([-0.5, -1.0, 0.0]),
        "versions": wire.ints([7, 7, 8]),
        "finished": True,
        "rewards": {"correct": 1.0, "format": None},
        **changes,
    }


def group(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "group",
        "lease": 5,
        "attempt": 1,
        "token": 2**64 - 1,
        "completions": [completion(), completion(finished=False)],
        "sampling_s": 1.5,
        "scoring_s": 0.0,
        "failures": {"x": "no"},
        "logged": {"tests passed": [0.5, 3.0]},
        **changes,
    }


LEASE = {
    "lease": 5,
    "attempt": 2,
    "token": 2**64 - 1,
    "min_version": 3,
    "problem_id": "gsm8k/17",
    "prompt": wire.ints([10, 11]),
    "seeds": [0, 2**64 - 1],
    "messages": [{"role": "user", "content": "2+2?"}],
    "answer": "4",
    # A number that MessagePack does not have, and nested values: a JSON text needs no bound on depth here.
    "columns": json.dumps({"level": 10**30, "tags": ["a", None, {"b": 0.5}]}),
}
HELLO = {
    "kind": "hello",
    "protocol": wire.PROTOCOL_VERSION,
    "role": "rollout",
    "name": "w-0",
    "host": "h",
    "pid": 12,
    "run_id": "",
}
BEAT = {"kind": "beat", "state": "sampling", "version": -1, "tokens": 10, "credits": 2, "holding": [1, 2]} | {
    "working_s": 3.5,
    "waiting_s": 0.25,
}
EVALUATION = {
    "kind": "evaluation",
    "update": 4,
    "checkpoint": "checkpoint-4",
    "report": report().model_dump(),
}
WELCOME = {
    "kind": "welcome",
    "run_id": "r",
    "config": "{}",
    "identity": "{}",
    "weights_endpoint": "ipc:///tmp/w",
    "beat_s": 1.0,
}
MANIFEST = {
    "kind": "manifest",
    "version": 3,
    "size": 24,
    "digest": "0" * 32,
    "chunk_bytes": 8,
    "tensors": [{"name": "a.weight", "dtype": "bfloat16", "shape": [3, 4], "offset": 0}],
}

EXAMPLES: list[tuple[TypeAdapter[Any], dict[str, Any]]] = [
    (wire.from_peer, HELLO),
    (wire.from_peer, group()),
    (wire.from_peer, BEAT),
    (wire.from_peer, EVALUATION),
    (wire.from_peer, {"kind": "bye", "reason": "done", "again": False}),
    (wire.from_learner, WELCOME),
    (wire.from_learner, {"kind": "grant", "leases": [LEASE, LEASE]}),
    (wire.from_learner, {"kind": "ack", "lease": 5, "attempt": 1, "accepted": False, "reason": "late"}),
    (wire.from_learner, {"kind": "announcement", "version": 3}),
    (wire.from_learner, {"kind": "bye", "reason": "", "again": True}),
    (wire.weights_request, {"kind": "fetch_manifest"}),
    (wire.weights_request, {"kind": "fetch_chunk", "version": 3, "index": 0}),
    (wire.weights_reply, MANIFEST),
    (wire.weights_reply, {"kind": "chunk", "version": 3, "index": 0}),
]

SEEDS = [msgpack.packb(example) for _, example in EXAMPLES]
VALUES: list[Any] = [
    None,
    True,
    -1,
    2**63,
    2**64 - 1,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x" * 300,
    b"",
    b"\xff" * 7,
]
VALUES += [[], {}, [[]] * 50, {"kind": "hello"}, [None] * 300]


def mutated(chance: random.Random) -> bytes:
    """Return a message with a change in its bytes or in its values."""
    data = bytearray(chance.choice(SEEDS))
    match chance.randrange(8):
        case 0:
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            del data[chance.randrange(len(data)) :]
        case 2:
            at = chance.randrange(len(data))
            data[at:at] = chance.randbytes(chance.randint(1, 16))
        case 3:
            at = chance.randrange(len(data))
            data[at : at + chance.randint(1, 16)] = chance.choice(
                [
                    b"\xc6\xff\xff\xff\xff",
                    b"\xdb\xff\xff\xff\xff",
                    b"\xdd\xff\xff\xff\xff",
                    b"\xdf\xff\xff\xff\xff",
                    b"\xc9\xff\xff\xff\xff",
                ]
            )
        case 4:
            at, other = chance.randrange(len(data)), chance.choice(SEEDS)
            data[at:] = other[chance.randrange(len(other)) :]
        case 5:
            data = bytearray(chance.randbytes(chance.randint(0, 200)))
        case 6:
            depth = chance.randint(1, 3000)
            at = chance.randrange(len(data))
            data[at:at] = chance.choice([b"\x91", b"\x81\xa1a"]) * depth
        case _:
            value = msgpack.unpackb(bytes(data))
            _spoil(value, chance)
            data = bytearray(msgpack.packb(value))
    return bytes(data)


def _spoil(value: Any, chance: random.Random) -> None:
    """Change one random entry in nested maps and lists."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice([*keys, "extra"] if isinstance(value, dict) else keys)
        inside = value.get(key) if isinstance(value, dict) else value[key]
        if isinstance(inside, dict | list) and inside and chance.random() < 0.7:
            value = inside
        elif isinstance(value, dict) and key in value and chance.random() < 0.2:
            del value[key]
            return
        else:
            value[key] = chance.choice(VALUES)
            return
