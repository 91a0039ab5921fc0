"""The exchange: a thread that owns every socket, the schedule and the journal while the learner computes.

The thread grants leases, accepts groups, serves weights and publishes events (`dispatcher`). This module is the
border between the two threads: a call of the learner queues work for the thread, or takes a batch from it, so
neither side needs a lock.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from grpo_actors.awake import AwakeClock
from grpo_actors.errors import TrainingError
from grpo_actors.learner.exchange.dispatcher import TICK_S, Dispatcher
from grpo_actors.learner.exchange.peers import BEAT_S
from grpo_actors.learner.exchange.sampling_rules import SamplingRules
from grpo_actors.learner.exchange.selection import Selection
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.observe.sinks import Journal
from grpo_actors.progress import LOST_S
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.quarantine import Gap, Quarantine
from grpo_actors.transport.access import Access
from grpo_actors.transport.control import ControlServer
from grpo_actors.transport.events import EventPublisher
from grpo_actors.transport.gate import gated
from grpo_actors.transport.sockets import Endpoints, zmq_context
from grpo_actors.transport.waiting import Waiter
from grpo_actors.transport.watch import watched
from grpo_actors.transport.weights import WeightsServer
from grpo_actors.wire import fetching
from grpo_actors.wire.messages import Evaluation, Manifest, Unscored, Welcome

__all__ = ["BEAT_S", "Exchange", "Quarantine", "SamplingRules", "Selection", "Supply"]

T = TypeVar("T")

#: Seconds that dismissed peers have to say Bye before the sockets close. An unread message is lost with its
#: connection, and a peer that never read its dismissal would wait for ever.
FAREWELL_S = 2.0
#: Longest wait for a message while requests for weights wait for memory, in seconds.
SHORT_S = 0.01
#: Seconds to wait for an answer before checking again that the thread is alive.
ANSWER_S = 0.5


class Exchange:
    """The learner's handle on the exchange thread. Call `start` first and `close` last."""

    def __init__(
        self,
        *,
        endpoints: Endpoints,
        table: LeaseTable[SampledGroup],
        supply: Supply,
        selection: Selection,
        quarantine: Quarantine,
        welcome: Welcome,
        open_journal: Callable[[EventPublisher], Journal],
        access: Access | None = None,
        evaluator_token: str = "",
        lost_s: float = LOST_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Keep the parts; bind nothing yet.

        `access`: who may use the sockets; None: everyone who reaches them. `evaluator_token`: secret of the run's own
        evaluator. `lost_s`: longest silence of a peer that has sent a beat, in seconds.
        """
        self._access = access or Access()
        self._evaluator_token = evaluator_token
        self._lost_s = lost_s
        self._endpoints = endpoints
        self._table = table
        self._supply = supply
        self._selection = selection
        self._quarantine = quarantine
        self._welcome = welcome
        self._open_journal = open_journal
        self._clock = AwakeClock() if clock is None else clock
        #: Work for the thread, which calls each function with its dispatcher.
        self._commands: queue.SimpleQueue[Callable[[Dispatcher], None]] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[list[SampledGroup] | None] = queue.SimpleQueue()
        self._waiter = Waiter()
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._bound: Future[None] = Future()
        self._failure: BaseException | None = None
        self._close_at_s: float | None = None

    # --- the learner's side -----------------------------------------------------------------------

    def start(self) -> None:
        """Bind the sockets and start the thread. Raises `RunError` if an address is taken."""
        self._thread.start()
        self._bound.result()

    def consume(self, leases: Sequence[int], gaps: Mapping[int, Sequence[Gap]]) -> None:
        """Consume these leases: their groups produced the next version.

        `gaps`: lease -> gaps between the log-probs of its worker and those that the update computed.
        """
        self._post(lambda dispatcher: dispatcher.consume(leases, gaps))

    def publish(self, manifest: Manifest, data: memoryview) -> None:
        """Serve this version to the workers. May be called on any thread."""
        self._post(lambda dispatcher: dispatcher.publish(manifest, data))

    def next_batch(self, timeout_s: float) -> list[SampledGroup] | None:
        """Return the groups of the next update, or None after `timeout_s`.

        Raises:
            BaseException: the error that ended the thread.
        """
        try:
            batch = self._batches.get(timeout=timeout_s) if timeout_s > 0 else self._batches.get_nowait()
        except queue.Empty:
            return None
        if batch is None:
            self._batches.put(None)  # for the next call
            raise self._thread_error()
        return batch

    def record(self, topic: str, **fields: Any) -> None:
        """Number, keep and publish one record."""
        self._post(lambda dispatcher: dispatcher.record(topic, fields))

    def snapshot(self) -> Snapshot:
        """Return the state that a resumed run continues from; all earlier calls have taken effect in it."""
        return self._ask(Dispatcher.snapshot)

    def take_evaluations(self) -> list[Evaluation | Unscored]:
        """Return the evaluations that arrived since the last call."""
        return self._ask(Dispatcher.take_evaluations)

    def take_tokens(self) -> int:
        """Return the number of sampled tokens in the groups that arrived since the last call."""
        return self._ask(Dispatcher.take_tokens)

    def alarm(self) -> str | None:
        """Return name and text of the alarm that was recorded for the last update; None if there was no alarm."""
        return self._ask(Dispatcher.alarm)

    def evaluator_present(self) -> bool:
        """Return whether an evaluator takes part."""
        return self._ask(Dispatcher.evaluator_present)

    def cpu_s(self) -> float:
        """Return the seconds of processor time that the thread has taken so far."""
        return self._ask(lambda _: time.thread_time())

    def dismiss(self, role: str, reason: str) -> None:
        """Make all peers of a role leave, and any that joins later."""
        self._post(lambda dispatcher: dispatcher.dismiss(role, reason))

    def wait_for_goodbyes(self) -> None:
        """Wait until all dismissed peers have said Bye, for at most `FAREWELL_S`."""
        deadline_s = time.monotonic() + FAREWELL_S
        while time.monotonic() < deadline_s and self._ask(Dispatcher.awaits_goodbyes):
            time.sleep(0.02)

    def close(self) -> None:
        """Stop the thread after it has done all earlier calls. May be called twice."""
        if self._thread.is_alive():
            self._post(lambda _: self._begin_to_close())
            self._thread.join()
        self._waiter.close()

    def _post(self, command: Callable[[Dispatcher], None]) -> None:
        self._commands.put(command)
        self._waiter.wake()

    def _ask(self, question: Callable[[Dispatcher], T]) -> T:
        answer: Future[T] = Future()
        self._post(lambda dispatcher: answer.set_result(question(dispatcher)))
        while True:
            # Check before the wait: a thread that ends after this line may have answered.
            alive = self._thread.is_alive()
            try:
                return answer.result(timeout=ANSWER_S if alive else 0)
            except TimeoutError:
                if not alive:
                    raise self._thread_error() from None

    def _thread_error(self) -> BaseException:
        return self._failure or TrainingError("the exchange was closed and answers no more calls")

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with (
                gated(self._endpoints) as endpoints,
                zmq_context() as context,
                self._access.enforced(context),
            ):
                control = ControlServer(context, endpoints.control, self._access)
                weights = WeightsServer(context, endpoints.weights, fetching, self._access)
                publisher = EventPublisher(context, endpoints.events, self._access)
                with contextlib.closing(publisher), self._open_journal(publisher) as journal:
                    dispatcher = Dispatcher(
                        control=control,
                        weights=weights,
                        journal=journal,
                        table=self._table,
                        supply=self._supply,
                        selection=self._selection,
                        quarantine=self._quarantine,
                        welcome=self._welcome,
                        lost_s=self._lost_s,
                        evaluator_token=self._evaluator_token,
                        clock=self._clock,
                    )
                    self._bound.set_result(None)
                    self._waiter.watch(control.socket, weights.socket)
                    with watched((control.socket, weights.socket, publisher.socket), self._access.delivered):
                        self._loop(dispatcher, weights, publisher)
        except BaseException as error:  # noqa: BLE001 - a thread's outermost frame: the learner raises it
            self._failure = error
            if not self._bound.done():
                self._bound.set_exception(error)
            self._batches.put(None)

    def _loop(self, dispatcher: Dispatcher, weights: WeightsServer, publisher: EventPublisher) -> None:
        while not self._may_close(dispatcher):
            self._waiter.wait(SHORT_S if weights.is_short else TICK_S)
            while not self._commands.empty():
                self._commands.get()(dispatcher)
            dispatcher.turn()
            publisher.tend()
            batch = dispatcher.next_batch()
            if batch is not None:
                self._batches.put(batch)

    def _begin_to_close(self) -> None:
        self._close_at_s = time.monotonic() + FAREWELL_S

    def _may_close(self, dispatcher: Dispatcher) -> bool:
        if self._close_at_s is None:
            return False
        return time.monotonic() >= self._close_at_s or not dispatcher.awaits_goodbyes()
