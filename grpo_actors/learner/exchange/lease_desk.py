"""The lease desk: grants leases to the workers, judges the groups that come back, and keeps them until they train.

It carries the decisions of others to the workers and into the journal: of `schedule` (which leases may be granted, which
groups may train), `supply` (what a group must look like) and `selection` (which groups count). Who takes part is none of its
business (`attendance`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from grpo_actors.errors import ProtocolError
from grpo_actors.learner.exchange.notices import Notices
from grpo_actors.learner.exchange.peers import Peer
from grpo_actors.learner.exchange.selection import Selection
from grpo_actors.learner.exchange.supply import Supply, oldest_version
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.schedule.lease import Claim, Cursor, Verdict
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.tasks.failures import Failures
from grpo_actors.wire import messages as wire


class LeaseDesk:
    """The leases of one run and their groups."""

    def __init__(
        self,
        *,
        table: LeaseTable[SampledGroup],
        supply: Supply,
        selection: Selection,
        notices: Notices,
        send: Callable[[Peer, wire.Message], bool],
    ) -> None:
        self._table = table
        self._table.leaves_out = self._is_left_out
        self._table.skips = selection.skips
        self._supply = supply
        self._selection = selection
        self._notices = notices
        self._send = send
        self._failures = Failures()
        self._batch_taken = False
        self._sampled_tokens = 0
        self._last_left_out = -1  # the last position whose exclusion was logged

    @property
    def version(self) -> int:
        """The version that the last consumed batch produced."""
        return self._table.version

    @property
    def cursor(self) -> Cursor:
        """The point from which a resumed run continues."""
        return self._table.cursor

    @property
    def awaits_groups(self) -> bool:
        """Whether the learner waits for groups that are not there yet."""
        return not self._batch_taken and self._table.next_batch() is None

    # --- batches ----------------------------------------------------------------------------------

    def next_batch(self) -> list[SampledGroup] | None:
        """Return the groups of the next update once all have arrived, else None.

        After that it returns None until `consume`: the learner has one batch at a time.
        """
        batch = None if self._batch_taken else self._table.next_batch()
        if batch is None:
            return None
        self._batch_taken = True
        return [group for _, group in batch]

    def consume(self, leases: Sequence[int]) -> None:
        """Consume the leases of the batch that was taken."""
        alarm = self._selection.settle(self._table.consume(leases))
        if alarm is not None:
            self._notices.alarm("no signal", alarm, self.version)
        self._batch_taken = False

    def session_of(self, lease: int) -> str:
        """Return the session that sampled a lease which has not been consumed."""
        return self._table.worker_of(lease)

    def take_tokens(self) -> int:
        """Return the number of sampled tokens in the groups that arrived since the last call."""
        tokens, self._sampled_tokens = self._sampled_tokens, 0
        return tokens

    # --- groups -----------------------------------------------------------------------------------

    def take_group(self, peer: Peer, message: wire.Group) -> None:
        """Judge a group, keep it if it may train, and acknowledge it.

        Raises:
            ProtocolError: the peer sent what no honest worker sends.
        """
        claim = Claim(peer.session, message.lease, message.attempt, message.token, oldest_version(message))
        verdict = self._table.judge(claim)
        if verdict.new:
            try:
                self._accept(peer, message, verdict)
            except ProtocolError as error:
                self._acknowledge(peer, replace(verdict, accepted=False, reason=str(error)), faulty=True)
                raise
        self._acknowledge(peer, verdict)
        if verdict.forged:
            raise ProtocolError(verdict.reason)

    def _accept(self, peer: Peer, message: wire.Group, verdict: Verdict) -> None:
        """Check the contents of the group, count it and put it into the lease table."""
        group = self._supply.read_group(message, peer.name, self.version)
        peer.groups += 1
        self._sampled_tokens += sum(sum(completion.sampled) for completion in group.completions)
        for text in self._failures.new(group.problem.id, group.failures):
            self._notices.warn(text)
        self._table.accept(verdict, group, self._selection.filter_group(group))
        self._notices.group_accepted()

    def _acknowledge(self, peer: Peer, verdict: Verdict, *, faulty: bool = False) -> None:
        """Acknowledge a group; give back its lease first if it is refused. Only this method does either."""
        claim = verdict.claim
        if not verdict.accepted:
            self._notices.blame(peer.name, verdict.reason)
            self._report_set_aside(self._table.refuse(claim, faulty=faulty))
        ack = wire.Ack(
            lease=claim.lease, attempt=claim.attempt, accepted=verdict.accepted, reason=verdict.reason
        )
        self._send(peer, ack)

    # --- leases that come back --------------------------------------------------------------------

    def hand_back(self, peer: Peer) -> None:
        """Take back the leases of a peer that leaves, or that goes for a reason which is not in the problems."""
        self._table.hand_back(peer.session)

    def release(self, peer: Peer) -> None:
        """Take back the leases of a peer that is lost: perhaps one of them has killed it."""
        self._report_set_aside(self._table.release(peer.session))

    def distrust(self, peer: Peer) -> None:
        """Take back all leases of a peer, and discard its groups that have not trained."""
        self._table.distrust(peer.session)

    def reconcile(self, peer: Peer, holding: Sequence[int], now_s: float) -> None:
        """Take back the leases that a peer should have but does not list."""
        self._table.reconcile(peer.session, holding, now_s)

    def expire(self, now_s: float) -> None:
        """Take back the leases that are past their deadline."""
        self._report_set_aside(self._table.expire(now_s))

    def _report_set_aside(self, positions: Sequence[int]) -> None:
        for position in positions:
            _, problem = self._supply.problem(position)
            self._notices.set_aside(position, problem.id)

    # --- granting ---------------------------------------------------------------------------------

    def grant(self, workers: Iterable[Peer], now_s: float) -> list[Peer]:
        """Grant the leases that may go out; return the workers that cannot be reached, which get none.

        The worker with the fewest comes first, so that all share a small window; of those, one that has weights; then the
        one that has waited longest: where there are more workers than leases, all take turns, and one that joins late, on
        a faster machine perhaps, is not left out. The last run of leases that a worker may hold would only wait there until
        the worker is free. It is granted only if no other worker asks for leases: another one may be free earlier.
        """
        present, unreached = list(workers), []
        # Leases are made for the first worker, not before: to make one may end the run.
        if not present or not self._table.has_waiting():
            return []
        run = self._table.batch_groups
        reserve = run if sum(peer.credits > 0 for peer in present) > 1 else 0
        # Counted once, and workers without room left out at once: with hundreds of workers, doing either for each
        # comparison would take the thread's whole time.
        held = self._table.holdings()
        room = {peer.session: max(min(run, peer.credits), peer.credits - reserve) for peer in present}
        willing = [peer for peer in present if held[peer.session] < room[peer.session]]
        while willing:
            peer = min(willing, key=lambda peer: (held[peer.session], peer.version < 0, peer.granted_s))
            granted = self._table.grant(peer.session, room[peer.session], now_s)
            if granted:
                grants = wire.Grant(leases=[self._supply.lease_message(grant) for grant in granted])
                if self._send(peer, grants):
                    peer.granted_s = now_s
                    held[peer.session] += len(granted)
                    if held[peer.session] < room[peer.session]:
                        continue
                else:
                    # The grant was never sent, so it does not count as a loss of these leases.
                    self._table.withdraw(granted)
                    unreached.append(peer)
            elif not self._table.has_waiting():
                break
            willing.remove(peer)
        return unreached

    def _is_left_out(self, position: int) -> bool:
        reason = self._supply.exclusion_reason(position)
        if reason is not None and position > self._last_left_out:  # the table may ask again for a position
            self._last_left_out = position
            self._notices.inform(reason)
        return reason is not None
