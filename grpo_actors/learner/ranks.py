"""The ranks of a learner: processes that share the micro-batches of each update and then take the same step.

Rank 0 deals the micro-batches. Each rank adds up the gradients of its own; the sum over all ranks is the gradient of the
update, because every token carries its weight in the loss of the whole update. Then every rank takes the step, and all of
them hold the same weights again.

Sums of arrays go through MLX's collectives, on whatever back end it has (nccl, ring, jaccl); micro-batches and statistics
through links from rank 0 to each of the others (`transport.links`). `Ranks` is a learner of one process: nothing is sent.
"""

import contextlib
import io
import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError
from grpo_actors.failpoints import reach
from grpo_actors.learner.rank_processes import host_of_first, launched_rank, lose_rank
from grpo_actors.objective.micro_batches import Array, MicroBatch, deal
from grpo_actors.policy.training import Training
from grpo_actors.process import EXIT_CRASH, is_supervised, leave
from grpo_actors.transport.links import Link, accept, connect, listening

#: Elements of the float32 arrays that one collective adds up: large enough for full speed, small next to the gradients.
BUCKET = 2**26
#: Seconds after which the failure of a collective is raised. If it failed because a rank ended, this process ends earlier.
_SETTLE_S = 5.0
#: Seconds between the end of another rank's process on this host and the latest moment at which its exit code is known.
_EXIT_CODE_S = 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one update that one rank computes."""

    micro_batches: Sequence[MicroBatch]
    #: The number of each of them among those of the update.
    numbers: Sequence[int]
    #: Micro-batches of the update, of all ranks together.
    total: int


class Ranks:
    """The only rank of a learner."""

    #: Number of this rank, and how many there are.
    rank = 0
    size = 1

    def deal(self, micro_batches: Sequence[MicroBatch]) -> Share:
        """Give each rank its share of an update, and return that of rank 0, which calls this."""
        return Share(micro_batches, range(len(micro_batches)), len(micro_batches))

    def collect(self, share: Share, arrays: Sequence[Array]) -> Sequence[Array]:
        """Return one array for each micro-batch of the update, in their order; each rank gives those of its share."""
        del share
        return arrays

    def add_gradients(self, share: Share, training: Training) -> None:
        """Replace the gradient of each rank by the sum over all ranks, unless the update has no micro-batch."""

    def agree(self, number: float) -> float:
        """Return the number of rank 0, so that what follows from it is the same on all ranks."""
        return number


class JoinedRanks(Ranks):
    """One of several ranks. They call the same methods in the same order."""

    def __init__(self, group: mx.distributed.Group) -> None:
        """Open the links; every rank of the group does."""
        self.rank, self.size, self._group = group.rank(), group.size(), group
        host, secret = host_of_first(), secrets.token_bytes(32)
        if self.rank:
            port, secret = self._first_key()
            self._links = [Link(connect(host, port, secret), self._lost)]
            self._links[0].send(str(self.rank).encode())
            return
        with listening(host, secret) as listener:
            self._first_key(listener.address[1], secret)
            links = [Link(accept(listener), self._lost) for _ in range(1, self.size)]
        by_rank = {int(link.receive()): link for link in links}
        self._links = [by_rank[rank] for rank in range(1, self.size)]

    def _first_key(self, port: int = 0, secret: bytes = bytes(32)) -> tuple[int, bytes]:
        """Return port and secret of rank 0, which gives them; the group itself is how the others learn them."""
        told = mx.array([float(byte) for byte in (*port.to_bytes(2), *secret)])
        first = np.array(self._total(told)).astype(int).tolist()
        return int.from_bytes(first[:2]), bytes(first[2:])

    # --- what they compute together ---------------------------------------------------------------

    def deal(self, micro_batches: Sequence[MicroBatch]) -> Share:
        """As `Ranks.deal`: by tokens, so that all need about the same time."""
        dealt = deal([batch.tokens.size for batch in micro_batches], self.size)
        total = len(micro_batches)
        shares = [Share([micro_batches[i] for i in numbers], numbers, total) for numbers in dealt]
        for link, share in zip(self._links, shares[1:], strict=True):
            link.send(_share_bytes(share))
        return shares[0]

    def next_share(self) -> Share:
        """Wait for this rank's share of the next update. Raises `LinkClosedError` if the run is over."""
        return _read_share(self._links[0].receive())

    def collect(self, share: Share, arrays: Sequence[Array]) -> Sequence[Array]:
        """As `Ranks.collect`; every rank gets all of them."""
        own = {str(number): array for number, array in zip(share.numbers, arrays, strict=True)}
        if self.rank:
            self._links[0].send(_to_bytes(own))
            every = _from_bytes(self._links[0].receive())
        else:
            every = own
            for link in self._links:
                every |= _from_bytes(link.receive())
            everything = _to_bytes(every)
            for link in self._links:
                link.send(everything)
        return [every[str(number)] for number in range(share.total)]

    def add_gradients(self, share: Share, training: Training) -> None:
        """As `Ranks.add_gradients`; a rank without a micro-batch adds zeros."""
        if self.rank:
            reach("rank.computed")
        if share.total:
            training.change_gradient(self._add_up)

    def agree(self, number: float) -> float:
        """As `Ranks.agree`. A GPU may add up the same numbers in another order each time."""
        if self.rank:
            return float(self.hear()["agreed"])
        self.tell({"agreed": number})
        return number

    def _add_up(self, arrays: list[mx.array]) -> None:
        """Replace float32 arrays by their sums over all ranks, a bucket at a time."""
        first = 0
        while first < len(arrays):
            end, size = first, 0
            while end < len(arrays) and (end == first or size + arrays[end].size <= BUCKET):
                size += arrays[end].size
                end += 1
            shapes = [array.shape for array in arrays[first:end]]
            flat = mx.concatenate([array.reshape(-1) for array in arrays[first:end]])
            arrays[first:end] = [mx.zeros(0)] * (end - first)  # frees what is in `flat` now
            total, begin = self._total(flat), 0
            del flat
            for i, shape in enumerate(shapes, first):
                count = int(np.prod(shape))
                arrays[i] = total[begin : begin + count].reshape(shape)
                begin += count
            first = end

    def _total(self, array: mx.array) -> mx.array:
        """Return the sum of an array over all ranks, evaluated: nothing else may be under way meanwhile."""
        mx.eval(array)
        try:
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
        except RuntimeError:
            time.sleep(_SETTLE_S)
            raise
        return total

    # --- before the first update ------------------------------------------------------------------

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Tell the other ranks something; rank 0 calls this."""
        for link in self._links:
            link.send(json.dumps(facts).encode())

    def hear(self) -> dict[str, Any]:
        """Return what rank 0 tells; the other ranks call this."""
        heard: dict[str, Any] = json.loads(self._links[0].receive())
        return heard

    def ask(self, answer: Any) -> list[Any]:
        """Return the answers of all ranks, in their order, to rank 0; nothing to the others."""
        if self.rank:
            self._links[0].send(json.dumps(answer).encode())
            return []
        return [answer, *(json.loads(link.receive()) for link in self._links)]

    def from_first(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the arrays of rank 0, to the bit; those of the other ranks only have their shapes and types."""
        copied = {}
        for name, array in sorted(arrays.items()):
            # x + (−0.0) is x for every x, −0.0 included. A count is exact in float32, and nccl need not know its type.
            floats = array if mx.issubdtype(array.dtype, mx.floating) else array.astype(mx.float32)
            told = mx.full(array.shape, -0.0, floats.dtype) if self.rank else floats
            copied[name] = self._total(told).astype(array.dtype)
        return copied

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Tell the other ranks that the run is over, and wait until they know."""
        for link in self._links:
            link.close()

    def _lost(self) -> None:
        """End this process: a rank has ended, and no collective would ever return."""
        if self.rank == 0:
            # If it ran on this host, its exit code is known meanwhile, and ends this process.
            time.sleep(_EXIT_CODE_S)
            lose_rank("the connection to another rank is lost")
        if not is_supervised():
            print(f"rank {self.rank}: rank 0 has ended", file=sys.stderr, flush=True)
        leave(EXIT_CRASH)


@contextlib.contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Join the other ranks of this learner, if it has others, until the block ends.

    Raises:
        ConfigError: Another number of processes was launched than the settings say.
    """
    if launched_rank() is None:
        yield Ranks()
        return
    ranks = JoinedRanks(mx.distributed.init(strict=True))
    if ranks.size != config.learner.ranks:
        raise ConfigError(
            f"learner.ranks: must be the number of processes that were launched, {ranks.size}, got {config.learner.ranks}"
        )
    ranks.tell({"config": config.model_dump(mode="json")})
    yield ranks
    ranks.close()  # not after an error: a rank that waits in a collective ends only if its link breaks


# --- messages -------------------------------------------------------------------------------------


def _share_bytes(share: Share) -> bytes:
    arrays = {
        f"{number} {field.name}": getattr(batch, field.name)
        for number, batch in zip(share.numbers, share.micro_batches, strict=True)
        for field in fields(batch)
    }
    return _to_bytes({"numbers": np.array([share.total, *share.numbers])} | arrays)


def _read_share(message: bytes) -> Share:
    arrays = _from_bytes(message)
    total, *numbers = arrays["numbers"].tolist()
    batches = [
        MicroBatch(**{field.name: arrays[f"{number} {field.name}"] for field in fields(MicroBatch)})
        for number in numbers
    ]
    return Share(batches, numbers, total)


def _to_bytes(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _from_bytes(message: bytes) -> dict[str, Array]:
    with np.load(io.BytesIO(message), allow_pickle=False) as arrays:
        return dict(arrays)
