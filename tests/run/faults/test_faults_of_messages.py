"""A hundred thousand mutated messages: at every decoder, and at a learner that trains."""

import contextlib
import json
import random
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import zmq
from example_messages import SEEDS, mutated
from usage import Usage

from grpo_actors.errors import ProtocolError
from grpo_actors.observe import records
from grpo_actors.tasks.own import frames
from grpo_actors.transport.sockets import Endpoints
from grpo_actors.wire import fetching
from grpo_actors.wire import messages as wire

MESSAGES = 100_000
#: MiB by which the memory of whoever decodes them may grow.
MAX_GROWTH_MIB = 50.0

RECORDS = [
    records.encode(
        records.make_record(7, 1.5, topic, {"update": 3, "text": "x", "version": 1, "state": "lost"})
    )
    for topic in ("metrics", "policy", "eval", "checkpoint", "worker", "alarm", "stop")
]
REWARD_FRAMES = [
    json.dumps(m).encode() for m in ({"call": "score", "texts": ["a", "b"]}, {"values": [0.5, None]})
]


def spoiled(chance: random.Random, lines: list[bytes]) -> bytes:
    """Return a JSON line with flipped bits, cut, joined with another one, or with digits and brackets put in."""
    data = bytearray(chance.choice(lines))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:] = chance.choice(lines)[at:]
            case 3:
                data[at:at] = chance.choice(
                    [b"[" * 2000, b"9" * 400, b"1e999", b"NaN", b'{"a":', b"\xff", b"\\ud800"]
                )
            case _:
                data[at : at + 1] = chance.randbytes(2)
    return bytes(data)


def round_trip(adapter) -> Callable[[bytes], object]:
    """Decode a message; one that is accepted fits the schema, so it can be encoded again."""

    def decode(data: bytes) -> object:
        message = wire.decode(adapter, data)
        assert wire.decode(adapter, wire.encode(message)) == message
        return message

    return decode


def receive_frame(data: bytes) -> object:
    """Receive bytes as a reward's answer: behind their true length, or as they are."""
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data if data[:1] == b"\xff" else struct.pack("!I", len(data)) + data)
        far.shutdown(socket.SHUT_WR)
        return frames.receive(near)


#: Decoder -> what it raises for what it does not accept, and whether it reads MessagePack.
DECODERS = {
    "from_peer": (round_trip(wire.from_peer), ProtocolError, True),
    "from_learner": (round_trip(wire.from_learner), ProtocolError, True),
    "weights_request": (round_trip(wire.weights_request), ProtocolError, True),
    "weights_reply": (round_trip(wire.weights_reply), ProtocolError, True),
    "read_request": (fetching.read_request, ProtocolError, True),
    "chunk_index": (lambda data: fetching.chunk_index(data, 3), ProtocolError, True),
    "record": (lambda data: records.encode(records.decode(data)), ProtocolError, False),
    "reward_frame": (receive_frame, (ValueError, EOFError), False),
}


@pytest.mark.faults
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_refuses_or_accepts_whole(decoder, note_figures):
    decode, refusal, is_packed = DECODERS[decoder]
    lines = REWARD_FRAMES if decoder == "reward_frame" else RECORDS
    chance, outcomes = random.Random(decoder), Counter()
    for number in range(MESSAGES):
        data = mutated(chance) if is_packed else spoiled(chance, lines)
        try:
            decode(data)
        except refusal:
            outcomes["refused"] += 1
        else:
            outcomes["accepted, and fit the schema"] += 1
        if number == MESSAGES // 100:
            before = most_mib()
    grown = most_mib() - before
    note_figures(f"{decoder}: {dict(outcomes)}, 0 crashes, +{grown:.1f} MiB")
    assert grown < MAX_GROWTH_MIB


@pytest.mark.faults
def test_a_learner_that_gets_them_trains_on_as_before(start_run, note_figures):
    run = start_run(max_updates=100_000, workers=2, eval_every_updates=0, save_steps=50)
    endpoints, chance, usage, sent = Endpoints.read(run.folder), random.Random(1), Usage(), Counter()
    usage.look(run)
    before = usage.largest("learner").memory_mb
    with zmq.Context() as context:
        for stranger in range(100):
            name, endpoint = [("control", endpoints.control), ("weights", endpoints.weights)][stranger % 2]
            with contextlib.closing(context.socket(zmq.DEALER)) as peer:
                peer.setsockopt(zmq.IDENTITY, f"stranger-{stranger}".encode())
                peer.setsockopt(zmq.LINGER, 2000)
                peer.setsockopt(zmq.SNDTIMEO, 120_000)
                peer.connect(endpoint)
                for _ in range(MESSAGES // 100):
                    data = mutated(chance)
                    if not is_hello(
                        data
                    ):  # that of a stranger who reaches the socket is as good as another's
                        peer.send_multipart([data, *chance.choices(SEEDS, k=chance.choice((0, 0, 0, 2)))])
                        sent[name] += 1
            usage.look(run)
    run.wait_for_update(run.updates() + 3)
    usage.look(run)
    run.stop_well()
    grown = usage.largest("learner").memory_mb - before
    note_figures(f"live learner: {dict(sent)} messages, 0 crashes, 0 groups of strangers, +{grown:.1f} MiB")
    assert {worker for *_, worker in run.ledger()} <= {"rollout-0", "rollout-1"}
    assert grown < 2 * MAX_GROWTH_MIB  # its own arrays grow meanwhile


def is_hello(data: bytes) -> bool:
    try:
        return isinstance(wire.decode(wire.from_peer, data), wire.Hello)
    except ProtocolError:
        return False


def most_mib() -> float:
    """Return the peak memory of this process in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
