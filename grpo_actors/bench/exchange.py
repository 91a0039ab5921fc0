"""Part ``exchange``: how many workers one exchange serves, and which share of the learner's time its thread takes.

The exchange, its sockets, lease table and journal are those of a run. The workers are simulated (`swarm`): real sockets
and messages, no model, no weights. First all of them wait, as while a learner computes, and only send their beats. Then the
learner of the bench takes each batch as soon as it is there, and the exchange does nothing but grant, accept and acknowledge.
"""

import contextlib
import tempfile
import time
from pathlib import Path

from grpo_actors.bench.bench_process import BenchProcess, ask_all
from grpo_actors.bench.figures import Figure
from grpo_actors.bench.options import Options, config_of
from grpo_actors.bench.swarm import REWARD, STOP, VOCABULARY
from grpo_actors.errors import RunError
from grpo_actors.learner.exchange.exchange import (
    BEAT_S,
    Exchange,
    Quarantine,
    SamplingRules,
    Selection,
    Supply,
)
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.observe.sinks import Journal
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.task import Problem
from grpo_actors.transport.sockets import Endpoints, plan_endpoints, remove_endpoints
from grpo_actors.wire.digest import digest
from grpo_actors.wire.messages import Manifest, Welcome

#: Seconds in which the workers only wait, and shortest time of a busy round.
IDLE_S, BUSY_S = 5.0, 3.0
#: Workers of one simulating process.
WORKERS_A_PROCESS = 128
#: Longest wait of the learner for a batch, in seconds.
PATIENCE_S = 300.0


def measure(options: Options, model_name: str) -> list[Figure]:
    """Measure this part; a round is at least `BUSY_S` of updates."""
    shape = config_of(options, model_name).rollout
    processes = -(-options.workers // WORKERS_A_PROCESS)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-bench-")))
        endpoints = plan_endpoints(folder, "ipc", "", 0)
        stack.callback(remove_endpoints, folder, endpoints)
        exchange = stack.enter_context(contextlib.closing(_exchange(options, endpoints, folder)))
        exchange.start()
        _publish(exchange, 0)
        swarms = [
            stack.enter_context(
                BenchProcess(
                    "grpo_actors.bench.swarm",
                    *(endpoints.control, str(number), str(len(range(number, options.workers, processes)))),
                    str(shape.max_new_tokens),
                    processes=processes + 1,
                )
            )
            for number in range(processes)
        ]
        started_s = time.monotonic()
        for swarm in swarms:
            swarm.answer()  # all of its workers have joined
        joined_s = time.monotonic() - started_s
        learner = _Learner(exchange, swarms)
        learner.update()  # every worker has a lease, and holds what it has sampled until there is room
        idle = learner.measured(IDLE_S, updates=False)
        busy = [learner.measured(BUSY_S, updates=True) for _ in range(options.rounds)]
    return [
        Figure("join all s", [joined_s]),
        Figure("waiting: beats/s", [idle["beats"]], options.workers / BEAT_S, is_rate=True),
        Figure("waiting: exchange's share of a core", [idle["cpu_s"]]),
        Figure("busy: groups/s", [each["groups"] for each in busy], is_rate=True),
        Figure("busy: messages/s", [each["messages"] for each in busy], is_rate=True),
        Figure("busy: exchange's share of a core", [each["cpu_s"] for each in busy]),
        Figure("busy: exchange's CPU a group ms", [1e3 * each["cpu_s"] / each["groups"] for each in busy]),
        Figure("busy: updates/s", [each["updates"] for each in busy], is_rate=True),
    ]


class _Learner:
    """The learner's side: takes batches, and publishes a version for each."""

    def __init__(self, exchange: Exchange, swarms: list[BenchProcess]) -> None:
        self._exchange = exchange
        self._swarms = swarms
        self._version = 0

    def update(self) -> None:
        """Take one batch, consume it and publish the next version; raises RunError if there is none for too long."""
        batch = self._exchange.next_batch(PATIENCE_S)
        if batch is None:
            raise RunError(
                f"the exchange had no batch for {PATIENCE_S:.0f} s: this machine is too slow for the workers"
            )
        self._exchange.consume([group.lease for group in batch], {})
        self._version += 1
        _publish(self._exchange, self._version)
        self._exchange.record("metrics", update=self._version)

    def measured(self, seconds: float, *, updates: bool) -> dict[str, float]:
        """Return rates per second of what happens in at least this time, in which updates follow each other, or none is made."""
        before, cpu_s, version = self._counts(), self._exchange.cpu_s(), self._version
        started_s = time.monotonic()
        while (left_s := started_s + seconds - time.monotonic()) > 0:
            if updates:
                self.update()
            else:
                time.sleep(left_s)
        spent_s = time.monotonic() - started_s
        counts = {name: count - before[name] for name, count in self._counts().items()}
        totals = counts | {
            "messages": sum(counts.values()),
            "cpu_s": self._exchange.cpu_s() - cpu_s,
            "updates": self._version - version,
        }
        return {name: total / spent_s for name, total in totals.items()}

    def _counts(self) -> dict[str, int]:
        """Return what all simulated workers have sent and received so far, by kind."""
        answers = ask_all(self._swarms, {})
        return {name: sum(answer[name] for answer in answers) for name in answers[0]}


def _publish(exchange: Exchange, version: int) -> None:
    data = memoryview(b"\0" * 1024)
    manifest = Manifest(version=version, size=1024, digest=digest(data), chunk_bytes=1024, tensors=[])
    exchange.publish(manifest, data)


def _exchange(options: Options, endpoints: Endpoints, folder: Path) -> Exchange:
    problems = [
        Problem(f"p{number}", ({"role": "user", "content": f"{number} + 1 = ?"},), str(number + 1), {})
        for number in range(1000)
    ]
    prompt = [2] * (options.prompt_tokens or 64)
    supply = Supply(
        problems=problems,
        order=ProblemOrder(len(problems), 0, shuffle=True),
        seed=0,
        num_generations=options.generations,
        max_prompt_length=len(prompt),
        encode_chat=lambda _: prompt,
        rules=SamplingRules(
            vocabulary=VOCABULARY,
            max_new_tokens=options.tokens,
            max_turns=1,
            stop_tokens=frozenset({STOP}),
            ends=lambda turn: turn[-1] == STOP,
            closing=(),
            rewards=frozenset({REWARD}),
        ),
    )
    table: LeaseTable[SampledGroup] = LeaseTable(
        groups_per_update=options.groups,
        max_staleness=1,
        batch_groups=1,
        lease_timeout_s=600.0,
        last_version=2**31,
    )
    welcome = Welcome(
        run_id="bench", config="{}", identity="{}", weights_endpoint=endpoints.weights, beat_s=BEAT_S
    )
    return Exchange(
        endpoints=endpoints,
        table=table,
        supply=supply,
        selection=Selection(supply.problem),
        quarantine=Quarantine(max_gap=1.0),
        welcome=welcome,
        open_journal=lambda publisher: Journal(folder, publish=publisher.publish),
    )
