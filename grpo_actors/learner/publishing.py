"""Publishing versions: copy the weights to where workers fetch them, while the learner starts its next update.

Depends on arrays and outlets; does not know who fetches the versions. A separate thread copies one version at a time
out of the device's memory. For a model of a gigabyte that takes a third of a second, during which the learner
would otherwise do nothing.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import mlx.core as mx

from grpo_actors.policy.pinned import pin
from grpo_actors.policy.weights import Frozen, freeze, pack
from grpo_actors.transport.sockets import CHUNK_BYTES
from grpo_actors.transport.weights import Room, open_outlets
from grpo_actors.wire.messages import Manifest


class Publisher:
    """The publisher of a run: calls `announce` with each version's manifest and bytes once they can be fetched."""

    def __init__(self, announce: Callable[[Manifest, memoryview], None]) -> None:
        self._announce = announce
        self._outlets = open_outlets(pin)
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
        for outlet in self._outlets:
            outlet.close()

    def _publish(self, frozen: Frozen) -> None:
        rooms = (outlet.room(frozen.version, frozen.size) for outlet in self._outlets)
        room = next((room for room in rooms if room is not None), Room())
        self._announce(*pack(frozen, CHUNK_BYTES, room.data, room.pin, partial(self._put, frozen.version)))

    def _put(self, version: int, data: memoryview) -> str:
        """Put a version into all outlets; return their addresses in the form that the manifest has."""
        addresses = [outlet.put(version, data) for outlet in self._outlets]
        return "\n".join(filter(None, addresses))
