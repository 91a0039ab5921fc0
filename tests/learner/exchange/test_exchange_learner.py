"""What the learner gets from the exchange: versions served, evaluations, snapshots, an orderly end."""

import os
import socket
import time
from collections.abc import Callable

import pytest
import xxhash
from bounds import HANG_S
from peers_for_tests import CHUNK, Run, evaluation, wait_until

from grpo_actors.errors import RunError, TrainingError
from grpo_actors.progress import LOST_S
from grpo_actors.schedule.lease import Cursor
from grpo_actors.transport.sockets import Endpoints, remove_endpoints, zmq_context
from grpo_actors.transport.weights import Version, WeightsClient
from grpo_actors.wire import fetching
from grpo_actors.wire import messages as wire

# --- weights -----------------------------------------------------------------------------------------


def fetch(run: Run) -> tuple[int, bytes] | None:
    """Fetch the newest version, as a worker does."""
    client = WeightsClient(run.context, run.endpoints.weights, fetching)  # type: ignore[attr-defined]
    try:
        answer = client.manifest()
        assert answer is not None
        manifest = wire.decode(wire.weights_reply, answer)
        assert isinstance(manifest, wire.Manifest)
        data = fetch_chunks(client, manifest)
        if data is None:
            return None
        assert xxhash.xxh3_128_hexdigest(bytes(data)) == manifest.digest
        return manifest.version, bytes(data)
    finally:
        client.socket.close()


def fetch_chunks(
    client: WeightsClient, manifest: wire.Manifest, on_chunk: Callable[[], None] = lambda: None
) -> bytearray | memoryview | None:
    arrived = client.fetch(Version(manifest.version, manifest.size, manifest.chunk_bytes), on_chunk)
    return None if arrived is None else arrived.data


def test_a_late_joiner_fetches_the_newest_version(run):
    run.publish(1)
    data = run.publish(2, size=10_500)
    run.exchange.snapshot()  # both are out
    assert fetch(run) == (2, data)


def test_a_version_that_is_replaced_in_mid_fetch_is_given_up_for_the_newer_one(run):
    run.publish(1, size=100 * CHUNK)
    client = WeightsClient(run.context, run.endpoints.weights, fetching)
    run.exchange.snapshot()
    answer = client.manifest()
    manifest = wire.decode(wire.weights_reply, answer)
    newer = b""

    def replace() -> None:
        nonlocal newer
        newer = newer or run.publish(2)
        run.exchange.snapshot()

    assert fetch_chunks(client, manifest, on_chunk=replace) is None
    client.socket.close()
    assert fetch(run) == (2, newer)


# --- evaluations, records, snapshots -----------------------------------------------------------------


def test_an_evaluation_counts_once(start):
    run = start(version=4)
    evaluator = run.peer("evaluator", role="evaluator").join()
    for update, accuracy in ((0, 0.5), (4, 0.6), (0, 0.7), (5, 0.9)):  # one twice, one of the future
        evaluator.send(evaluation(update, accuracy))
    wait_until(lambda: run.records("log"))
    assert [(e.update, e.report.accuracy) for e in run.exchange.take_evaluations()] == [(0, 0.5), (4, 0.6)]
    assert run.exchange.take_evaluations() == []
    assert run.exchange.evaluator_present()


def test_an_evaluator_is_present_from_its_hello_to_its_bye(run):
    assert not run.exchange.evaluator_present()
    run.peer("w").join()
    assert not run.exchange.evaluator_present(), "a worker is none"
    evaluator = run.peer("evaluator", role="evaluator").join()
    assert run.exchange.evaluator_present()
    evaluator.send(wire.Bye())
    wait_until(lambda: run.states("evaluator")[-1] == "left")
    assert not run.exchange.evaluator_present()


def test_a_lost_evaluator_is_not_present(run):
    run.peer("evaluator", role="evaluator").join().wait_until_seen()
    run.clock.ahead_s += LOST_S + 1
    wait_until(lambda: run.states("evaluator")[-1] == "lost")
    assert not run.exchange.evaluator_present()


def test_a_snapshot_holds_all_that_was_recorded_before_it(run):
    peer = run.peer("w").join()
    for lease in peer.take(capacity=4, runs=2):
        peer.deliver(lease)
    batch = run.exchange.next_batch(HANG_S)
    run.publish(1, [group.lease for group in batch])
    run.exchange.record("metrics", update=1)
    snapshot = run.exchange.snapshot()
    assert snapshot.cursor == Cursor(2, ())
    records = run.records()
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    assert snapshot.records == len(records)
    assert [record["topic"] for record in records[-2:]] == [
        "worker",
        "metrics",
    ]  # the workers' states come before the metrics


def test_a_resumed_run_continues_at_its_cursor(start):
    run = start(version=1, cursor=Cursor(2, (3,)))
    leases = run.peer("w").join().take(capacity=4, runs=3)
    assert [lease.lease for lease in leases] == [2, 4, 5, 6][: len(leases)]


# --- the end -----------------------------------------------------------------------------------------


def test_closing_waits_for_the_goodbyes_of_dismissed_peers(run, monkeypatch):
    monkeypatch.setattr("grpo_actors.learner.exchange.exchange.FAREWELL_S", HANG_S)
    peer = run.peer("w").join()
    run.exchange.dismiss("rollout", "the run is over")
    assert peer.receive(wire.Bye).reason == "the run is over"
    peer.send(wire.Bye(reason="dismissed"))
    began = time.monotonic()
    run.exchange.close()
    assert time.monotonic() - began < HANG_S
    assert run.states("w")[-1] == "left"


def test_the_worker_in_the_learners_own_process_says_no_goodbye(run, monkeypatch):
    monkeypatch.setattr("grpo_actors.learner.exchange.exchange.FAREWELL_S", HANG_S)
    run.peer("local", host=socket.gethostname(), pid=os.getpid()).join()
    run.exchange.dismiss("rollout", "the run is over")
    began = time.monotonic()
    run.exchange.wait_for_goodbyes()
    run.exchange.close()
    assert time.monotonic() - began < HANG_S


def test_closing_waits_for_at_most_farewell_s(run, monkeypatch):
    monkeypatch.setattr("grpo_actors.learner.exchange.exchange.FAREWELL_S", 0.5)
    run.peer("deaf").join()
    run.exchange.dismiss("rollout", "the run is over")
    began = time.monotonic()
    run.exchange.close()
    assert 0.5 <= time.monotonic() - began < HANG_S


def test_a_peer_that_joins_after_the_dismissal_is_dismissed_too(run):
    early = run.peer("early").join()
    run.exchange.dismiss("rollout", "the run is over")
    run.exchange.snapshot()  # it has taken effect
    late = run.peer("late")
    late.send(late.hello())
    # Not a refusal: a worker that is refused ends with exit code 2, one that is not needed with 0.
    assert late.receive(wire.Bye) == wire.Bye(reason="the run is over", dismissed=True)
    early.send(wire.Bye())


def test_a_lost_dismissal_is_sent_again_at_the_next_beat(run):
    peer = run.peer("w").join()
    run.exchange.dismiss("rollout", "the run is over")
    for _ in range(2):
        peer.beat(capacity=2)
        assert peer.receive(wire.Bye).reason == "the run is over"
    peer.send(wire.Bye())


def test_an_error_that_ends_the_thread_is_raised_in_the_learner(start):
    run = start()

    def full_disk(topic: str, line: bytes) -> None:
        raise RunError("metrics.jsonl cannot be written (No space left on device)")

    run.exchange._post(lambda dispatcher: setattr(dispatcher._journal, "_publish", full_disk))
    run.exchange.record("metrics", update=1)
    for question in (
        lambda: run.exchange.next_batch(HANG_S),
        run.exchange.snapshot,
        run.exchange.take_tokens,
    ):
        with pytest.raises(RunError, match="No space left"):
            question()


def test_nothing_can_be_asked_after_the_end_and_closing_twice_is_harmless(run):
    run.exchange.close()
    run.exchange.close()
    run.exchange.record("log", level="info", text="to nobody")
    with pytest.raises(TrainingError, match="was closed"):
        run.exchange.take_tokens()


def test_an_address_in_use_is_refused_at_the_start(tmp_path):
    with zmq_context() as zmq_sockets, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = Run(tmp_path, zmq_sockets)
        port = taken.getsockname()[1]
        run.exchange._endpoints = Endpoints(f"tcp://127.0.0.1:{port}", "ipc://x", "ipc://y", 0)
        with pytest.raises(RunError, match="is in use"):
            run.exchange.start()
        run.exchange.close()
        remove_endpoints(tmp_path, run.endpoints)
