"""One rank among the others: sums of arrays through MLX's collectives, messages through links to and from rank 0.

MLX's collectives work on whatever back end it has (nccl, ring, jaccl). Nothing can interrupt them, and on CUDA they wait
for a dead rank without end. So the links (`transport.links`) also watch: if a rank ends, all end.
"""

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.errors import RunError, first_line
from grpo_actors.process import EXIT_CRASH, is_supervised, leave
from grpo_actors.ranks.processes import forget_meeting_points, host_of_first, launched_rank, lose_rank
from grpo_actors.transport.links import Link, accept, connect, listening

#: Seconds after which the failure of a collective is raised. If it failed because a rank ended, this process ends earlier.
_SETTLE_S = 5.0
#: Seconds between the end of another rank's process on this host and the latest moment at which its exit code is known.
_EXIT_CODE_S = 1.0


def join() -> "RankGroup":
    """Meet the other ranks.

    Raises:
        RunError: A rank after the first cannot. Rank 0 ends as if it had lost one: its supervisor tries again.
    """
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        why = f"the ranks cannot meet: {first_line(error)}"
        if launched_rank() == 0:
            lose_rank(why)
        raise RunError(why) from error
    return RankGroup(group)


class RankGroup:
    """The group, as one of its ranks sees it. All ranks call the methods with collectives in the same order."""

    def __init__(self, group: mx.distributed.Group) -> None:
        """Open the links; every rank of the group does."""
        #: Number of this rank, and how many there are.
        self.rank, self.size, self.collectives = group.rank(), group.size(), group
        host, secret = host_of_first(), secrets.token_bytes(32)
        if self.rank:
            port, secret = self._first_key()
            self.links = [Link(connect(host, port, secret), self._lost)]
            self.links[0].send(str(self.rank).encode())
            return
        with listening(host, secret) as listener:
            self._first_key(listener.address[1], secret)
            links = [Link(accept(listener), self._lost) for _ in range(1, self.size)]
        by_rank = {int(link.receive()): link for link in links}
        forget_meeting_points()
        self.links = [by_rank[rank] for rank in range(1, self.size)]

    def _first_key(self, port: int = 0, secret: bytes = bytes(32)) -> tuple[int, bytes]:
        """Return port and secret of rank 0, which gives them; the group itself is how the others learn them."""
        told = mx.array([float(byte) for byte in (*port.to_bytes(2), *secret)])
        first = np.array(self.total(told)).astype(int).tolist()
        return int.from_bytes(first[:2]), bytes(first[2:])

    # --- messages ---------------------------------------------------------------------------------

    def send(self, message: bytes) -> None:
        """Send a message, which is not empty, to the other ranks; rank 0 calls this."""
        for link in self.links:
            link.send(message)

    def receive(self) -> bytes:
        """Return the next message of rank 0; the other ranks call this.

        Raises:
            LinkClosedError: Rank 0 has ended in order.
        """
        return self.links[0].receive()

    def tell(self, facts: Any) -> None:
        """Tell the other ranks something that JSON can hold; rank 0 calls this."""
        self.send(json.dumps(facts).encode())

    def hear(self) -> Any:
        """Return what rank 0 tells; raises as `receive`."""
        return json.loads(self.receive())

    def ask(self, answer: Any) -> list[Any]:
        """Return the answers of all ranks, in their order, to rank 0; nothing to the others."""
        if self.rank:
            self.links[0].send(json.dumps(answer).encode())
            return []
        return [answer, *(json.loads(link.receive()) for link in self.links)]

    # --- arrays -----------------------------------------------------------------------------------

    def total(self, array: mx.array) -> mx.array:
        """Return the sum of an array over all ranks, evaluated: nothing else may be under way meanwhile."""
        mx.eval(array)
        with self.computing():
            total = mx.distributed.all_sum(array, group=self.collectives)
            mx.eval(total)
        return total

    def from_one(self, mine: mx.array | None, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Return the array of the one rank that has it, to the bit; the others give None."""
        # A count is exact in float32, and nccl need not know its type.
        floats = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32
        return self.total(neutral(shape, floats) if mine is None else mine.astype(floats)).astype(dtype)

    def from_first(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the arrays of rank 0, to the bit; those of the other ranks only have their shapes and types."""
        return {
            name: self.from_one(None if self.rank else array, array.shape, array.dtype)
            for name, array in sorted(arrays.items())
        }

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Let a failed collective raise its error only after the end of another rank would have ended this process."""
        try:
            yield
        except RuntimeError:
            time.sleep(_SETTLE_S)
            raise

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Tell the other ranks that the work is over, and wait until they know."""
        for link in self.links:
            link.close()

    def _lost(self) -> None:
        """End this process: a rank has ended, and no collective would ever return."""
        if self.rank == 0:
            # If it ran on this host, its exit code is known meanwhile, and ends this process.
            time.sleep(_EXIT_CODE_S)
            lose_rank("the connection to another rank is lost")
        if not is_supervised():
            print(f"rank {self.rank}: rank 0 has ended", file=sys.stderr)
        leave(EXIT_CRASH)


def neutral(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Return what changes no sum: x + (−0.0) is x for every x, −0.0 included."""
    return mx.full(shape, -0.0, dtype)


def name_of(dtype: mx.Dtype) -> str:
    """Return the name of a type, for a message."""
    return str(dtype).rpartition(".")[2]


def dtype_of(name: str) -> mx.Dtype:
    """Return the type of this name."""
    dtype: mx.Dtype = getattr(mx, name)
    return dtype
