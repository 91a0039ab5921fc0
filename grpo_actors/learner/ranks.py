"""The ranks of a learner: processes that share the micro-batches of each update and then take the same step.

Rank 0 deals the micro-batches. Each rank adds up the gradients of its own; the sum over all ranks is the gradient of the
update, because every token carries its weight in the loss of the whole update. Then each rank takes the step for its own
part of the trained arrays, of which it alone holds the float32 weights and the optimizer's state (ZeRO, 1910.02054, stage
1), and gives the others the weights that it moved: all of them hold the same weights again.

A part consists of whole arrays, because Muon needs whole matrices, and Adafactor the means of their rows and columns.

Sums of arrays go through MLX's collectives, on whatever back end it has (nccl, ring, jaccl); micro-batches and statistics
through links from rank 0 to each of the others (`transport.links`). `Ranks` is a learner of one process: nothing is sent.
"""

import contextlib
import io
import json
import secrets
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.config import Config
from grpo_actors.dealing import deal
from grpo_actors.errors import ConfigError
from grpo_actors.failpoints import reach
from grpo_actors.learner.rank_processes import host_of_first, launched_rank, lose_rank
from grpo_actors.objective.micro_batches import Array, MicroBatch
from grpo_actors.policy.training import Training
from grpo_actors.process import EXIT_CRASH, is_supervised, leave
from grpo_actors.progress import report_progress
from grpo_actors.rundir.tensor_files import Remote
from grpo_actors.transport.links import Link, accept, connect, listening

#: Elements of the float32 arrays that one collective adds up: large enough for full speed, small next to the gradients.
BUCKET = 2**26
#: Seconds after which the failure of a collective is raised. If it failed because a rank ended, this process ends earlier.
_SETTLE_S = 5.0
#: Seconds between the end of another rank's process on this host and the latest moment at which its exit code is known.
_EXIT_CODE_S = 1.0
#: First byte of what rank 0 sends between updates: a share of the next one, or the question for an array.
_SHARE, _GIVE = b"s", b"g"


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

    def owned(self, arrays: Mapping[str, mx.array]) -> Collection[str] | None:
        """Return the names of the trained arrays that this rank's steps move; None: all."""
        del arrays
        return None

    def share_weights(self, training: Training) -> None:
        """Give the other ranks the weights that this rank's step has moved, and take theirs."""

    def remote_state(self) -> Mapping[str, Remote]:
        """Return the part of the training state that the other ranks hold, to be fetched between two updates."""
        return {}


class JoinedRanks(Ranks):
    """One of several ranks. They call the same methods in the same order."""

    def __init__(self, group: mx.distributed.Group) -> None:
        """Open the links; every rank of the group does."""
        self.rank, self.size, self._group = group.rank(), group.size(), group
        #: Arrays of the training state that other ranks hold: owner, shape and type. Only rank 0 knows them.
        self._remote: dict[str, tuple[int, list[int], mx.Dtype]] = {}
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
            link.send(_SHARE + _share_bytes(share))
        return shares[0]

    def next_share(self, training: Training) -> Share:
        """Wait for this rank's share of the next update; until then, give rank 0 the state that it asks for.

        Raises:
            LinkClosedError: The run is over.
        """
        state: Mapping[str, mx.array] = {}
        while (message := self._links[0].receive()).startswith(_GIVE):
            state = state or training.state()
            question = json.loads(message.removeprefix(_GIVE))
            mine = state.get(question["name"]) if question["owner"] == self.rank else None
            self._from_one(mine, question["shape"], _dtype(question["dtype"]))
        return _read_share(message.removeprefix(_SHARE))

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

    def owned(self, arrays: Mapping[str, mx.array]) -> Collection[str]:
        """As `Ranks.owned`."""
        return frozenset(parts(arrays, self.size)[self.rank])

    def share_weights(self, training: Training) -> None:
        """As `Ranks.share_weights`, one owner after the other: a bucket holds only what is replaced together."""
        weights = training.weights()
        for owner, names in enumerate(parts(weights, self.size)):
            mine = owner == self.rank
            moved = [weights.pop(name) for name in names]
            if not mine:
                moved = [_nothing(array.shape, array.dtype) for array in moved]
            self._add_up(moved)
            if not mine:
                training.replace_weights(dict(zip(names, moved, strict=True)))

    def remote_state(self) -> Mapping[str, Remote]:
        """As `Ranks.remote_state`, once `share_state` was called; only rank 0 calls it."""
        return {
            name: Remote(tuple(shape), dtype, partial(self._fetch, name, shape, dtype, owner))
            for name, (owner, shape, dtype) in self._remote.items()
        }

    def _fetch(self, name: str, shape: Sequence[int], dtype: mx.Dtype, owner: int) -> mx.array:
        question = {"name": name, "owner": owner, "shape": shape, "dtype": _name(dtype)}
        for link in self._links:
            link.send(_GIVE + json.dumps(question).encode())
        report_progress()
        return self._from_one(None, shape, dtype)

    def _add_up(self, arrays: list[mx.array]) -> None:
        """Replace arrays by their sums over all ranks, a bucket of one type at a time."""
        first = 0
        while first < len(arrays):
            end, size = first, 0
            while end < len(arrays) and (
                end == first
                or (size + arrays[end].size <= BUCKET and arrays[end].dtype == arrays[first].dtype)
            ):
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

    def _from_one(self, mine: mx.array | None, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Return the array of the one rank that has it, to the bit; the others give None."""
        # A count is exact in float32, and nccl need not know its type.
        floats = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32
        return self._total(_nothing(shape, floats) if mine is None else mine.astype(floats)).astype(dtype)

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
        return {
            name: self._from_one(None if self.rank else array, array.shape, array.dtype)
            for name, array in sorted(arrays.items())
        }

    def share_state(self, training: Training, *, restored: bool) -> None:
        """Tell rank 0 which training state each rank holds; if rank 0 has restored one, give each rank its part."""
        described = {
            name: (list(array.shape), _name(array.dtype)) for name, array in training.state().items()
        }
        self._remote = {}
        wanted: set[str] = set()
        for owner, state in enumerate(self.ask(described)[1:], 1):
            wanted |= state.keys()
            for name, (shape, dtype) in state.items():
                if name not in described:  # each has the optimizer's step, and that of rank 0 counts
                    self._remote[name] = owner, shape, _dtype(dtype)
        if not restored:
            return
        if self.rank == 0:
            whole = training.take_loaded() | training.state()
            given = [
                (name, whole[name].shape, _name(whole[name].dtype)) for name in sorted(wanted & whole.keys())
            ]
            self.tell({"given": given})
            for name, shape, dtype in given:
                self._from_one(whole.pop(name), shape, _dtype(dtype))
            return
        own = {}
        for name, shape, dtype in self.hear()["given"]:
            array = self._from_one(None, shape, _dtype(dtype))
            if name in described:
                own[name] = array
        training.load_state(own)

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


# --- arrays ---------------------------------------------------------------------------------------


def parts(arrays: Mapping[str, mx.array], ranks: int) -> list[list[str]]:
    """Divide the trained arrays among ranks by their elements; return the names of each rank's, sorted."""
    names = sorted(arrays)
    dealt = deal([arrays[name].size for name in names], ranks)
    return [[names[number] for number in numbers] for numbers in dealt]


def _nothing(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Return what changes no sum: x + (−0.0) is x for every x, −0.0 included."""
    return mx.full(shape, -0.0, dtype)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _dtype(name: str) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, name)
    return dtype


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
