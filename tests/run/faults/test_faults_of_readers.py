"""Readers that stop, come late or never read, and peers that send rubbish: the run does not notice."""

import random
import signal

import pytest
import zmq
from runs import kill

from grpo_actors.transport.sockets import Endpoints
from grpo_actors.wire.messages import Beat, Bye, encode


@pytest.mark.faults
def test_fifty_readers_that_never_read_and_one_that_is_stopped(start_run):
    run = start_run(max_updates=30, workers=2)
    tail = run.tail()
    assert tail.stdout.readline()
    kill(tail.pid, signal.SIGSTOP)
    with zmq.Context() as context:
        readers = [context.socket(zmq.SUB) for _ in range(50)]
        for reader in readers:
            reader.setsockopt(zmq.RCVHWM, 1)
            reader.setsockopt(zmq.SUBSCRIBE, b"")
            reader.connect(Endpoints.read(run.folder).events)
        run.wait_for_update(25)
        for reader in readers:
            reader.close(linger=0)
    kill(tail.pid, signal.SIGCONT)
    tail.kill()
    run.end_well()
    assert run.exit_codes == [0]


@pytest.mark.faults
def test_peers_that_send_rubbish_to_every_socket(start_run):
    run = start_run(max_updates=30, workers=2, eval_every_updates=0)
    rng = random.Random(0)
    sound = [encode(Bye(reason="x")), encode(Beat(state="waiting"))]
    endpoints = Endpoints.read(run.folder)
    with zmq.Context() as context:
        for endpoint in (endpoints.control, endpoints.weights):
            for stranger in range(20):
                peer = context.socket(zmq.DEALER)
                peer.setsockopt(zmq.IDENTITY, f"stranger-{stranger}".encode())
                peer.connect(endpoint)
                for _ in range(100):
                    peer.send_multipart(mutated(rng, sound))
                peer.close(linger=1000)
    run.end_well()
    assert run.exit_codes == [0]


def mutated(rng, sound):
    """One to three frames, each a sound message cut, extended or with flipped bits."""
    frames = []
    for _ in range(rng.randint(1, 3)):
        data = bytearray(rng.choice(sound))
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        data = data[: rng.randint(0, len(data))] + rng.randbytes(rng.randint(0, 40))
        frames.append(bytes(data))
    return frames
