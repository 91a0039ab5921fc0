"""Part ``weights``: from the learner's `publish` until other processes have adopted the version.

The publisher, the weights sockets and the shared memory are those of a run; in the exchange's place stands a
thread that serves, and in the announcement's a line to each worker's pipe.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from grpo_actors.bench.companion import Companion
from grpo_actors.bench.figures import Figure
from grpo_actors.bench.floors import publication_floor_s
from grpo_actors.bench.options import Options, config_of
from grpo_actors.bench.peak_rates import host_copy_bytes_per_s
from grpo_actors.learner.publishing import Publisher
from grpo_actors.policy.model import load_policy
from grpo_actors.transport.sockets import plan_endpoints, remove_endpoints, zmq_context
from grpo_actors.transport.weights import WeightsServer
from grpo_actors.wire import fetching
from grpo_actors.wire.messages import Manifest, encode

#: One into each of the two files that versions are written to in turn: their pages are made then.
WARM_UP = 2
#: Between two looks at whether the bench is over.
POLL_MS = 20


@dataclass
class Desk:
    """Announces a version to those who are to fetch it, and notes when."""

    server: WeightsServer
    endpoint: str
    fetchers: list[Companion]
    #: Whether the version's file is kept from them.
    chunks: bool
    announced_s: float = 0.0
    size: int = 0
    over: bool = False
    #: Between the publisher's thread and the one that serves. Nobody asks before he is told to.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def announce(self, manifest: Manifest, data: memoryview) -> None:
        """What the publisher calls when the bytes can be fetched."""
        if self.chunks:
            manifest = manifest.model_copy(update={"path": ""})
        with self.lock:
            self.server.publish(manifest.version, encode(manifest), data, manifest.chunk_bytes)
        self.announced_s, self.size = time.perf_counter(), manifest.size
        for fetcher in self.fetchers:
            fetcher.send({"endpoint": self.endpoint})

    def serve(self) -> None:
        """Until the bench is over."""
        while not self.over:
            if self.server.socket.poll(POLL_MS):
                with self.lock:
                    self.server.serve()


def measure(options: Options, model_name: str) -> list[Figure]:
    """The figures of this part."""
    config = config_of(options, model_name)
    policy = load_policy(config.model, seed=config.run.seed)
    bandwidth = host_copy_bytes_per_s()
    count = options.fetchers
    with contextlib.ExitStack() as stack:
        fetchers = [
            stack.enter_context(
                Companion("grpo_actors.bench.fetcher", config.model_dump_json(), processes=1 + count)
            )
            for _ in range(count)
        ]
        for fetcher in fetchers:
            fetcher.answer()
        desk = stack.enter_context(_desk(fetchers, chunks=options.chunks))
        publisher = stack.enter_context(contextlib.closing(Publisher(desk.announce)))
        held, packed, adopted = [], [], []
        for version in range(options.rounds + WARM_UP):
            arrays = policy.trainable()
            mx.eval(arrays)
            started_s = time.perf_counter()
            publisher.publish(version, arrays)
            held.append(time.perf_counter() - started_s)
            answers = [fetcher.answer() for fetcher in fetchers]
            adopted.append(time.perf_counter() - started_s)
            assert answers == [{"version": version}] * count
            packed.append(desk.announced_s - started_s)
    held, packed, adopted = held[WARM_UP:], packed[WARM_UP:], adopted[WARM_UP:]
    size, floor_s = desk.size, publication_floor_s(desk.size, bandwidth, count, chunks=options.chunks)
    fetched = [whole - announced for whole, announced in zip(adopted, packed, strict=True)]
    return [
        Figure("publish to adopted s", adopted, floor_s),
        Figure("GB/s", [size / seconds / 1e9 for seconds in adopted], size / floor_s / 1e9, is_rate=True),
        Figure("publish to announced s", packed),
        Figure("announced to adopted s", fetched),
        Figure("learner held up s", held),
        Figure("version MB", [size / 1e6]),
    ]


@contextlib.contextmanager
def _desk(fetchers: list[Companion], *, chunks: bool) -> Iterator[Desk]:
    """A server on an ipc socket, with the thread that serves it."""
    with TemporaryDirectory(prefix="grpo-bench-") as folder, zmq_context() as context:
        endpoints = plan_endpoints(Path(folder), "ipc", "", 0)
        desk = Desk(WeightsServer(context, endpoints.weights, fetching), endpoints.weights, fetchers, chunks)
        thread = threading.Thread(target=desk.serve, name="weights")
        thread.start()
        try:
            yield desk
        finally:
            desk.over = True
            thread.join()
            remove_endpoints(Path(folder), endpoints)
