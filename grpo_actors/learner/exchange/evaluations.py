"""The evaluator's scores on their way to the learner: one for each update, none for an update still to come."""

from grpo_actors.errors import ProtocolError
from grpo_actors.rundir.folder import checkpoint_name
from grpo_actors.wire.messages import Evaluation, Unscored


class Evaluations:
    """The scores that arrived, kept until the learner takes them."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._fresh: list[Evaluation | Unscored] = []

    def add(self, evaluation: Evaluation | Unscored, newest_version: int) -> None:
        """Keep a score, or the word that there will be none, unless its update already has one.

        Raises:
            ProtocolError: the update is newer than `newest_version`, or the checkpoint's name is not that of the update.
        """
        name = checkpoint_name(evaluation.update)
        if evaluation.checkpoint != name:
            raise ProtocolError(
                f"the checkpoint of update {evaluation.update} is {name}, got {evaluation.checkpoint!r}"
            )
        if evaluation.update > newest_version:
            raise ProtocolError(
                f"update {newest_version} is the newest, got an evaluation of {evaluation.update}"
            )
        if evaluation.update not in self._known:
            self._known.add(evaluation.update)
            self._fresh.append(evaluation)

    def take(self) -> list[Evaluation | Unscored]:
        """Return the scores that arrived since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
