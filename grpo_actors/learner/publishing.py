"""Publishing versions: copy the weights to where workers fetch them, while the learner starts its next update.

Depends on arrays and senders; does not know who fetches the versions. A separate thread copies one version at a time
out of the memory of the device. For a model of a gigabyte that takes a third of a second, during which the learner
would otherwise do nothing.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import mlx.core as mx

from grpo_actors.policy.pinned import pin
from grpo_actors.policy.weights import Frozen, freeze, pack
from grpo_actors.transport.sockets import CHUNK_BYTES
from grpo_actors.transport.weights import Buffer, open_senders
from grpo_actors.wire.messages import Manifest


class Publisher:
    """The publisher of a run: calls `announce` with each version's manifest and bytes once they can be fetched."""

    def __init__(self, announce: Callable[[Manifest, memoryview], None]) -> None:
        self._announce = announce
        self._senders = open_senders(pin)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publisher")
        self._under_way: Future[None] | None = None

    def publish(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """Start to publish a version; wait for the previous one first, so that only one is published at a time."""
        # All computation happens here; the thread only copies.
        frozen = freeze(version, arrays)
        self.wait()
        self._under_way = self._thread.submit(self._publish, frozen)

    def wait(self) -> None:
        """Wait until every version given so far is published.

        Raises:
            Exception: the error that publishing raised.
        """
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def close(self) -> None:
        """Finish the version under way, and free the memory."""
        self._thread.shutdown()
        for sender in self._senders:
            sender.close()

    def unlink(self) -> None:
        """Remove what would outlive this process if it ends at once; any thread may call it."""
        for sender in self._senders:
            sender.unlink()

    def _publish(self, frozen: Frozen) -> None:
        buffers = (sender.buffer(frozen.version, frozen.size) for sender in self._senders)
        buffer = next((buffer for buffer in buffers if buffer is not None), Buffer())
        self._announce(
            *pack(frozen, CHUNK_BYTES, buffer.data, buffer.pin, partial(self._put, frozen.version))
        )

    def _put(self, version: int, data: memoryview) -> str:
        """Give a version to all senders; return their addresses in the form that the manifest has."""
        addresses = [sender.publish(version, data) for sender in self._senders]
        return "\n".join(filter(None, addresses))
