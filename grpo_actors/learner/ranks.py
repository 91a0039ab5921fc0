"""The ranks of a learner: processes that share the micro-batches of each update and then take the same step.

Rank 0 deals the micro-batches. Each rank adds up the gradients of its own; the sum over all ranks is the gradient of the
update, because every token carries its weight in the loss of the whole update. Then each rank takes the step for its own
part of the trained arrays, of which it alone holds the float32 weights and the optimizer's state (ZeRO, 1910.02054, stage
1), and gives the others the weights that it moved: all of them hold the same weights again. With ``learner.divide_gradient``
it holds the gradient of its part alone, too (stage 2): the gradients of all ranks are added up after each micro-batch.

A part consists of whole arrays, because Muon needs whole matrices, and Adafactor the means of their rows and columns.

With ``learner.divide_model`` the ranks divide the frozen weights instead of the micro-batches (`policy.sharding`): each
computes all of them, together with the others.

Sums of arrays go through MLX's collectives, on whatever back end it has (nccl, ring, jaccl); micro-batches and statistics
through links from rank 0 to each of the others (`transport.links`). `Ranks` is a learner of one process: nothing is sent.
"""

import contextlib
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import mlx.core as mx
import numpy as np

from grpo_actors.config import Config
from grpo_actors.dealing import deal
from grpo_actors.errors import ConfigError
from grpo_actors.failpoints import reach
from grpo_actors.objective.micro_batches import Array, MicroBatch
from grpo_actors.policy.gpu_rows import GRADIENT_PART
from grpo_actors.policy.training import AddUp, Training
from grpo_actors.progress import report_progress
from grpo_actors.ranks.group import RankGroup, dtype_of, join, name_of, neutral
from grpo_actors.ranks.processes import launched_rank
from grpo_actors.rundir.tensor_files import Remote

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
    #: Micro-batches of the rank that has most of them.
    rounds: int


class Ranks:
    """The only rank of a learner."""

    #: Number of this rank, and how many there are.
    rank = 0
    size = 1
    #: The group among which the model is divided; None: each rank has all of it.
    collectives: mx.distributed.Group | None = None
    #: What adds up the gradients of all ranks after each micro-batch; None: `add_gradients` does, after the last one.
    add_each: AddUp | None = None

    @property
    def dealt_among(self) -> int:
        """Number of ranks that get other micro-batches of an update."""
        return 1

    def deal(self, micro_batches: Sequence[MicroBatch]) -> Share:
        """Give each rank its share of an update, and return that of rank 0, which calls this."""
        total = len(micro_batches)
        return Share(micro_batches, range(total), total, total)

    def collect(self, share: Share, arrays: Sequence[Array]) -> Sequence[Array]:
        """Return one array for each micro-batch of the update, in their order; each rank gives those of its share."""
        del share
        return arrays

    def add_gradients(self, share: Share, training: Training, parts: Collection[str] = ()) -> None:
        """Replace the gradient of each rank by that of the update, unless it has no micro-batch.

        Args:
            share: This rank's micro-batches.
            training: What has computed their gradient.
            parts: Of a divided model, names of the arrays of whose gradient each rank computes a part.
        """

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
    """One of several ranks, each with all of the model. They call the same methods in the same order."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank, group.size
        #: Arrays of the training state that other ranks hold: owner, shape and type. Only rank 0 knows them.
        self._remote: dict[str, tuple[int, list[int], mx.Dtype]] = {}

    @property
    def dealt_among(self) -> int:
        """As `Ranks.dealt_among`."""
        return self.size

    # --- what they compute together ---------------------------------------------------------------

    def deal(self, micro_batches: Sequence[MicroBatch]) -> Share:
        """As `Ranks.deal`: by tokens, so that all need about the same time."""
        dealt = deal([batch.tokens.size for batch in micro_batches], self.size)
        total, rounds = len(micro_batches), max(map(len, dealt))
        shares = [Share([micro_batches[i] for i in numbers], numbers, total, rounds) for numbers in dealt]
        for link, share in zip(self.group.links, shares[1:], strict=True):
            link.send(_SHARE + _share_bytes(share))
        return shares[0]

    def next_share(self, training: Training) -> Share:
        """Wait for this rank's share of the next update; until then, give rank 0 the state that it asks for.

        Raises:
            LinkClosedError: The run is over.
        """
        state: Mapping[str, mx.array] = {}
        while (message := self.group.receive()).startswith(_GIVE):
            state = state or training.state()
            question = json.loads(message.removeprefix(_GIVE))
            mine = state.get(question["name"]) if question["owner"] == self.rank else None
            self.group.from_one(mine, question["shape"], dtype_of(question["dtype"]))
        return _read_share(message.removeprefix(_SHARE))

    def collect(self, share: Share, arrays: Sequence[Array]) -> Sequence[Array]:
        """As `Ranks.collect`; every rank gets all of them."""
        own = {str(number): array for number, array in zip(share.numbers, arrays, strict=True)}
        if self.rank:
            self.group.links[0].send(_to_bytes(own))
            every = _from_bytes(self.group.receive())
        else:
            every = own
            for link in self.group.links:
                every |= _from_bytes(link.receive())
            self.group.send(_to_bytes(every))
        return [every[str(number)] for number in range(share.total)]

    def add_gradients(self, share: Share, training: Training, parts: Collection[str] = ()) -> None:
        """As `Ranks.add_gradients`; a rank without a micro-batch adds zeros."""
        if self.rank:
            reach("rank.computed")
        if share.total:
            training.change_gradient(partial(self._gradients, training, parts))

    def _gradients(self, training: Training, parts: Collection[str], arrays: list[mx.array]) -> None:
        """Replace the gradients of this rank, in the order of their names, by those of the update."""
        del training, parts
        self._add_up(arrays)

    def agree(self, number: float) -> float:
        """As `Ranks.agree`. A GPU may add up the same numbers in another order each time."""
        if self.rank:
            return float(self.group.hear()["agreed"])
        self.group.tell({"agreed": number})
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
                moved = [neutral(array.shape, array.dtype) for array in moved]
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
        question = {"name": name, "owner": owner, "shape": shape, "dtype": name_of(dtype)}
        self.group.send(_GIVE + json.dumps(question).encode())
        report_progress()
        return self.group.from_one(None, shape, dtype)

    def _add_up(self, arrays: list[mx.array]) -> None:
        """Replace arrays by their sums over all ranks, a bucket of one type at a time."""
        first = 0
        while first < len(arrays):
            end, size = first, 0
            while end < len(arrays) and (
                end == first
                or (size + arrays[end].size <= GRADIENT_PART and arrays[end].dtype == arrays[first].dtype)
            ):
                size += arrays[end].size
                end += 1
            shapes = [array.shape for array in arrays[first:end]]
            flat = mx.concatenate([array.reshape(-1) for array in arrays[first:end]])
            arrays[first:end] = [mx.zeros(0)] * (end - first)  # frees what is in `flat` now
            total, begin = self.group.total(flat), 0
            del flat
            for i, shape in enumerate(shapes, first):
                count = int(np.prod(shape))
                arrays[i] = total[begin : begin + count].reshape(shape)
                begin += count
            first = end

    # --- before the first update ------------------------------------------------------------------

    def share_state(self, training: Training, *, restored: bool) -> None:
        """Tell rank 0 which training state each rank holds; if rank 0 has restored one, give each rank its part."""
        described = {
            name: (list(array.shape), name_of(array.dtype)) for name, array in training.state().items()
        }
        self._remote = {}
        wanted: set[str] = set()
        for owner, state in enumerate(self.group.ask(described)[1:], 1):
            wanted |= state.keys()
            for name, (shape, dtype) in state.items():
                if name not in described:  # each has the optimizer's step, and that of rank 0 counts
                    self._remote[name] = owner, shape, dtype_of(dtype)
        if not restored:
            return
        if self.rank == 0:
            whole = training.take_loaded() | training.state()
            given = [
                (name, whole[name].shape, name_of(whole[name].dtype))
                for name in sorted(wanted & whole.keys())
            ]
            self.group.tell({"given": given})
            for name, shape, dtype in given:
                self.group.from_one(whole.pop(name), shape, dtype_of(dtype))
            return
        own = {}
        for name, shape, dtype in self.group.hear()["given"]:
            array = self.group.from_one(None, shape, dtype_of(dtype))
            if name in described:
                own[name] = array
        training.load_state(own)


class GradientRanks(JoinedRanks):
    """One of several ranks that hold the gradient of their own part only."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(group)
        self.add_each = self._add_up

    def add_gradients(self, share: Share, training: Training, parts: Collection[str] = ()) -> None:
        """As `Ranks.add_gradients`: take part in what the others still add up after their micro-batches."""
        del parts
        if self.rank:
            reach("rank.computed")
        for _ in range(share.rounds - len(share.micro_batches)):
            training.accumulate_nothing(self._add_up)
            report_progress()

    def agree(self, number: float) -> float:
        """As `Ranks.agree`: the norm of the gradient, of which each rank gives that of its part."""
        squares = float(self.group.total(mx.array([number * number])))
        return super().agree(math.sqrt(squares))


class DividedRanks(JoinedRanks):
    """One of several ranks among which the frozen weights are divided. All compute the same micro-batches together."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(group)
        self.collectives = group.collectives

    @property
    def dealt_among(self) -> int:
        """As `Ranks.dealt_among`."""
        return 1

    def deal(self, micro_batches: Sequence[MicroBatch]) -> Share:
        """As `Ranks.deal`: each rank gets all of them."""
        every = Ranks.deal(self, micro_batches)
        self.group.send(_SHARE + _share_bytes(every))
        return every

    def collect(self, share: Share, arrays: Sequence[Array]) -> Sequence[Array]:
        """As `Ranks.collect`: those of rank 0, so that what follows from them is the same on all ranks."""
        if self.rank:
            first = _from_bytes(self.group.receive())
            return [first[str(number)] for number in share.numbers]
        self.group.send(_to_bytes(dict(zip(map(str, share.numbers), arrays, strict=True))))
        return arrays

    def _gradients(self, training: Training, parts: Collection[str], arrays: list[mx.array]) -> None:
        """Let each gradient that every rank has computed as a whole count once, and add up the others."""
        if self.rank:
            for i, name in enumerate(sorted(training.weights())):
                if name not in parts:
                    arrays[i] = neutral(arrays[i].shape, arrays[i].dtype)
        super()._gradients(training, parts, arrays)


@contextlib.contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Join the other ranks of this learner, if it has others, until the block ends.

    Raises:
        ConfigError: Another number of processes was launched than the settings say.
    """
    if launched_rank() is None:
        yield Ranks()
        return
    group = join()
    if group.size != config.learner.ranks:
        raise ConfigError(
            f"learner.ranks: must be the number of processes that were launched, {group.size}, got {config.learner.ranks}"
        )
    group.tell({"config": config.model_dump(mode="json")})
    yield ranks_of(config, group)
    group.close()  # not after an error: a rank that waits in a collective ends only if its link breaks


def ranks_of(config: Config, group: RankGroup) -> JoinedRanks:
    """Return this rank of a learner with these settings."""
    if config.learner.divide_model:
        return DividedRanks(group)
    return GradientRanks(group) if config.learner.divide_gradient else JoinedRanks(group)


# --- arrays ---------------------------------------------------------------------------------------


def parts(arrays: Mapping[str, mx.array], ranks: int) -> list[list[str]]:
    """Divide the trained arrays among ranks by their elements; return the names of each rank's, sorted."""
    names = sorted(arrays)
    dealt = deal([arrays[name].size for name in names], ranks)
    return [[names[number] for number in numbers] for numbers in dealt]


# --- messages -------------------------------------------------------------------------------------


def _share_bytes(share: Share) -> bytes:
    arrays = {
        f"{number} {field.name}": getattr(batch, field.name)
        for number, batch in zip(share.numbers, share.micro_batches, strict=True)
        for field in fields(batch)
    }
    return _to_bytes({"numbers": np.array([share.total, share.rounds, *share.numbers])} | arrays)


def _read_share(message: bytes) -> Share:
    arrays = _from_bytes(message)
    total, rounds, *numbers = arrays["numbers"].tolist()
    batches = [
        MicroBatch(**{field.name: arrays[f"{number} {field.name}"] for field in fields(MicroBatch)})
        for number in numbers
    ]
    return Share(batches, numbers, total, rounds)


def _to_bytes(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _from_bytes(message: bytes) -> dict[str, Array]:
    with np.load(io.BytesIO(message), allow_pickle=False) as arrays:
        return dict(arrays)
