"""The order of a run's records, also when its learner is started again: which of them a reader has read.

Numbers rise within a session, which is the life of one learner. A resumed learner continues numbering from its checkpoint,
so a number alone does not tell whether a record is new, and a time does not either: clocks are set back.

    session a   1 2 3 4 5 6         a reader that has read these
    session b         4 5 …         takes 4 and 5 of b, and nothing of a any more
"""

from dataclasses import dataclass, field

from grpo_actors.observe.records import Record


@dataclass
class Reading:
    """What one reader has read of a run."""

    #: Number of the last record.
    seq: int = 0
    #: Sessions of the records, in order; the last one is the present.
    sessions: list[str] = field(default_factory=list)

    def is_new(self, record: Record) -> bool:
        """Return whether the record comes after the last one."""
        if self.sessions[-1:] == [session_of(record)]:
            return bool(record["seq"] > self.seq)
        return session_of(record) not in self.sessions

    def mark(self, record: Record) -> None:
        """Mark a new record as read."""
        if self.sessions[-1:] != [session_of(record)]:
            self.sessions.append(session_of(record))
        self.seq = record["seq"]


def session_of(record: Record) -> str:
    """Return the session in which the record was written."""
    return str(record.get("session", ""))
