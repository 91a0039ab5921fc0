"""The ranks of a learner after the first: they start from its state, compute their shares of each update, and end with it.

They have the settings and everything that changes from rank 0, and the model from where the settings say. They know no
run folder, no worker and no record.
"""

import contextlib
import zlib
from collections.abc import Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.errors import ModelError, TrainingError
from grpo_actors.learner.agreement import check_agreement
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.loading import check_decoding, load_model
from grpo_actors.learner.ranks import JoinedRanks, ranks_of
from grpo_actors.policy.model import Policy
from grpo_actors.process import bound_memory
from grpo_actors.ranks.group import join
from grpo_actors.transport.links import LinkClosedError


def follow(allowed: Sequence[str]) -> int:
    """Be a rank after the first, from its start to its end; return the exit code of the process.

    Args:
        allowed: Names of the code that the settings may run (`consent`).
    """
    with contextlib.suppress(LinkClosedError):
        group = join()
        config = Config.model_validate(group.hear()["config"])
        ranks = ranks_of(config, group)
        consent.check(consent.code_of_model(config.model), allowed, "the settings of rank 0")
        bound_memory()
        policy = load_model(config, ranks.collectives)
        check_decoding(config, policy)
        grpo = receive_state(ranks, config, policy)
        if ranks.collectives is not None:
            check_agreement(grpo, group.hear())
        grpo.warm_up()
        # Rank 0 meets the same error, and reports it.
        with contextlib.suppress(TrainingError):
            while True:
                grpo.learn(ranks.next_share(grpo.training))
    return 0


def give_state(grpo: Grpo) -> None:
    """Let the other ranks start from the state of this one, which is rank 0; nothing for a learner of one process.

    Raises:
        ModelError: Another rank has loaded other weights.
    """
    ranks = grpo.ranks
    if not isinstance(ranks, JoinedRanks):
        return
    ranks.group.tell(
        {
            "total_updates": grpo.total_updates,
            "version": grpo.version,
            "reference_refreshed": grpo.reference_refreshed,
        }
    )
    _copy_state(grpo, ranks)
    _check(grpo, ranks)


def check_together(grpo: Grpo, prompt: Sequence[int]) -> str | None:
    """Check the model as `check_agreement` does; rank 0 calls this, and the others compute their parts of it."""
    if isinstance(grpo.ranks, JoinedRanks) and grpo.ranks.collectives is not None:
        grpo.ranks.group.tell(list(prompt))
    return check_agreement(grpo, prompt)


def receive_state(ranks: JoinedRanks, config: Config, policy: Policy) -> Grpo:
    """Return a learner in the state of rank 0, given the model as it is loaded for a new run."""
    state = ranks.group.hear()
    grpo = Grpo(config, policy, state["total_updates"], ranks=ranks)
    grpo.version, grpo.reference_refreshed = state["version"], state["reference_refreshed"]
    _copy_state(grpo, ranks)
    _check(grpo, ranks)
    return grpo


def _copy_state(grpo: Grpo, ranks: JoinedRanks) -> None:
    """Copy from rank 0 what a resumed run has restored; of a new run, each rank has loaded the same."""
    restored = bool(grpo.version)
    if restored:
        if grpo.reference is not None and grpo.reference_refreshed:
            grpo.reference = ranks.group.from_first(grpo.reference)
        grpo.policy.load_trainable(ranks.group.from_first(grpo.policy.trainable()))
    ranks.share_state(grpo.training, restored=restored)


def _check(grpo: Grpo, ranks: JoinedRanks) -> None:
    """Check that all ranks hold the same weights, and begin with the trials for which a divided model needs all of them."""
    _ = grpo.layout
    first, *others = ranks.group.ask(_fingerprint(grpo.policy)) or [None]
    for rank, other in enumerate(others, 1):
        if other != first:
            raise ModelError(
                f"{grpo.policy.name}: rank {rank} has loaded other weights than rank 0; every host needs the same files and "
                "the same versions of MLX and mlx-lm"
            )


def _fingerprint(policy: Policy) -> int:
    """Return a checksum of all weights of the model, computed where they are; of a divided one, of those that train."""
    sums: list[int] = []
    held = policy.model.parameters() if policy.sharding is None else policy.model.trainable_parameters()
    for _, array in sorted(tree_flatten(held)):
        values = array.reshape(-1).view(mx.uint8)
        whole = values.size // 4 * 4
        sums += [int(values[:whole].view(mx.uint32).sum().item()), int(values[whole:].sum().item())]
    return zlib.crc32(repr(sums).encode())
