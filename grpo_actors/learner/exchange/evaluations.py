"""The evaluator's scores on their way to the learner: each update's once, none of an update to come."""

from grpo_actors.errors import ProtocolError
from grpo_actors.wire.messages import Evaluation


class Evaluations:
    """Scores that came in."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._fresh: list[Evaluation] = []

    def add(self, evaluation: Evaluation, newest_version: int) -> None:
        """Keep a score, unless its update has one.

        Raises:
            ProtocolError: there is no such update yet.
        """
        if evaluation.update > newest_version:
            raise ProtocolError(
                f"update {newest_version} is the newest, got an evaluation of {evaluation.update}"
            )
        if evaluation.update not in self._known:
            self._known.add(evaluation.update)
            self._fresh.append(evaluation)

    def take(self) -> list[Evaluation]:
        """Those that came in since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
