"""Part ``weights``: time from the learner's `publish` until other processes have adopted the version.

The publisher, the weights sockets and the shared memory are those of a run. A thread takes the place of the
exchange, and a line on each worker process's pipe takes the place of the announcement.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from grpo_actors.bench.bench_process import BenchProcess
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

#: One version into each of the two files that versions alternate between: the first write allocates their pages.
WARM_UP = 2
#: Milliseconds between two checks whether the bench is over.
POLL_MS = 20


@dataclass
class VersionServer:
    """Announces versions to the fetchers, notes when, and serves the bytes."""

    server: WeightsServer
    endpoint: str
    fetchers: list[BenchProcess]
    #: Whether the manifest hides the version's file, so that fetchers must use the socket.
    chunks: bool
    announced_s: float = 0.0
    size: int = 0
    over: bool = False
    #: Guards `server` between the publisher's thread and the serving thread. Fetchers request only after an order.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def announce(self, manifest: Manifest, data: memoryview) -> None:
        """Publish a version and send each fetcher an order; the publisher calls this once the bytes are ready."""
        if self.chunks:
            manifest = manifest.model_copy(update={"path": ""})
        with self.lock:
            self.server.publish(manifest.version, encode(manifest), data, manifest.chunk_bytes)
        self.announced_s, self.size = time.perf_counter(), manifest.size
        for fetcher in self.fetchers:
            fetcher.send({"endpoint": self.endpoint})

    def serve(self) -> None:
        """Serve requests until the bench is over."""
        while not self.over:
            if self.server.socket.poll(POLL_MS):
                with self.lock:
                    self.server.serve()


def measure(options: Options, model_name: str) -> list[Figure]:
    """Measure this part."""
    config = config_of(options, model_name)
    policy = load_policy(config.model, seed=config.run.seed)
    bandwidth = host_copy_bytes_per_s()
    count = options.fetchers
    with contextlib.ExitStack() as stack:
        fetchers = [
            stack.enter_context(
                BenchProcess("grpo_actors.bench.fetcher", config.model_dump_json(), processes=1 + count)
            )
            for _ in range(count)
        ]
        for fetcher in fetchers:
            fetcher.answer()
        server = stack.enter_context(_version_server(fetchers, chunks=options.chunks))
        publisher = stack.enter_context(contextlib.closing(Publisher(server.announce)))
        publish_s, announced_s, adopted_s = [], [], []
        for version in range(options.rounds + WARM_UP):
            arrays = policy.trainable()
            mx.eval(arrays)
            started_s = time.perf_counter()
            publisher.publish(version, arrays)
            publish_s.append(time.perf_counter() - started_s)
            answers = [fetcher.answer() for fetcher in fetchers]
            adopted_s.append(time.perf_counter() - started_s)
            assert answers == [{"version": version}] * count
            announced_s.append(server.announced_s - started_s)
    publish_s, announced_s, adopted_s = publish_s[WARM_UP:], announced_s[WARM_UP:], adopted_s[WARM_UP:]
    size, floor_s = server.size, publication_floor_s(server.size, bandwidth, count, chunks=options.chunks)
    fetched_s = [adopted - announced for adopted, announced in zip(adopted_s, announced_s, strict=True)]
    return [
        Figure("publish to adopted s", adopted_s, floor_s),
        Figure("GB/s", [size / seconds / 1e9 for seconds in adopted_s], size / floor_s / 1e9, is_rate=True),
        Figure("publish to announced s", announced_s),
        Figure("announced to adopted s", fetched_s),
        Figure("learner held up s", publish_s),
        Figure("version MB", [size / 1e6]),
    ]


@contextlib.contextmanager
def _version_server(fetchers: list[BenchProcess], *, chunks: bool) -> Iterator[VersionServer]:
    """Open a server on an ipc socket, with a thread that serves it."""
    with TemporaryDirectory(prefix="grpo-bench-") as folder, zmq_context() as context:
        endpoints = plan_endpoints(Path(folder), "ipc", "", 0)
        server = VersionServer(
            WeightsServer(context, endpoints.weights, fetching), endpoints.weights, fetchers, chunks
        )
        thread = threading.Thread(target=server.serve, name="weights")
        thread.start()
        try:
            yield server
        finally:
            server.over = True
            thread.join()
            remove_endpoints(Path(folder), endpoints)
