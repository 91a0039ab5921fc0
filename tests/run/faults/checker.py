"""Read what a finished run wrote, and say which promises it broke. Starts nothing, and trusts only the files.

A run with `record_groups = true` leaves three accounts of the same groups: the ledger of its records, groups.jsonl, and the
cursors of its checkpoints. They must agree, however often its processes were killed.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_actors.rundir.checkpoints import find_checkpoints, verify
from grpo_actors.rundir.folder import STATE

#: How the alarm "problem set aside" ends.
SET_ASIDE = re.compile(r"\(lease (\d+)\)$")


class RunFiles:
    """The files of one run folder, parsed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return self._lines("metrics.jsonl")

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        return self._lines("groups.jsonl")

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        return self.of("metrics")

    @cached_property
    def trained(self) -> list[tuple[int, int]]:
        """(update, lease) of each group that trained, in order."""
        return [(record["update"], entry[0]) for record in self.updates for entry in record["ledger"]]

    def of(self, topic: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["topic"] == topic]

    def set_aside(self) -> set[int]:
        """The leases that were dropped with an alarm."""
        alarms = (record for record in self.of("alarm") if record["name"] == "problem set aside")
        return {int(SET_ASIDE.search(alarm["text"])[1]) for alarm in alarms}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def broken_promises(folder: Path) -> list[str]:
    """Return a line for each promise that the run in this folder broke; [] if it held all."""
    files = RunFiles(folder)
    checks = (numbering, leases, groups_trained, staleness, one_digest_per_version, checkpoints, scores)
    return [f"{check.__name__}: {line}" for check in checks for line in check(files)]


def numbering(files: RunFiles) -> Iterator[str]:
    """Records and updates have neither gap nor repeat, and neither have checkpoints and scores."""
    for what, numbers in (
        ("records", [record["seq"] for record in files.records]),
        ("updates", [record["update"] for record in files.updates]),
    ):
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"{what} are not 1 to {len(numbers)}: {_first_step(numbers)}"
    for topic in ("checkpoint", "eval"):
        repeated = [n for n, times in Counter(r["update"] for r in files.of(topic)).items() if times > 1]
        if repeated:
            yield f"{topic} of update {repeated} recorded more than once"


def leases(files: RunFiles) -> Iterator[str]:
    """Each problem's group trained once, or was dropped with a reason."""
    entries = [entry for record in files.updates for entry in record["ledger"]]
    trained = [lease for lease, *_ in entries]
    if trained != sorted(set(trained)):
        yield f"leases trained twice or out of order: {_first_step(trained)}"
    twice = [key for key, n in Counter((epoch, problem) for _, epoch, problem, _ in entries).items() if n > 1]
    if twice:
        yield f"problems trained twice in an epoch: {twice[:5]}"
    if both := files.set_aside() & set(trained):
        yield f"leases set aside, and trained: {sorted(both)}"
    missing = set(range(max(trained, default=-1) + 1)) - set(trained) - files.set_aside()
    counted = sum(
        sum((record["groups_passed_over"] or {}).values()) + (record["problems_skipped"] or 0)
        for record in files.updates
    )
    if len(missing) != counted:
        yield f"{len(missing)} leases neither trained nor set aside, {counted} passed over: {sorted(missing)[:9]}"


def groups_trained(files: RunFiles) -> Iterator[str]:
    """groups.jsonl has the groups of the ledger, whole."""
    recorded = [(group["update"], group["lease"]) for group in files.groups]
    if recorded != files.trained:
        odd = set(recorded) ^ set(files.trained)
        yield f"groups.jsonl and the ledger differ in (update, lease) {sorted(odd)[:5] or 'order'}"
    size = files.config["rollout"]["num_generations"]
    for group in files.groups:
        if len(group["completions"]) != size:
            yield f"lease {group['lease']} trained with {len(group['completions'])} of {size} completions"


def staleness(files: RunFiles) -> Iterator[str]:
    """0 ≤ version gap ≤ S for every token that trained: update n is made by version n - 1."""
    bound = files.config["rollout"]["max_staleness"]
    for group in files.groups:
        gaps = [group["update"] - 1 - v for c in group["completions"] for v in c["versions"]]
        if not (min(gaps) >= 0 and max(gaps) <= bound):
            yield f"lease {group['lease']} trained {min(gaps)} to {max(gaps)} versions late, bound {bound}"


def one_digest_per_version(files: RunFiles) -> Iterator[str]:
    """A version that was published again, after a resume, has the same weights."""
    digests: dict[int, set[str]] = {}
    for record in files.of("policy"):
        digests.setdefault(record["version"], set()).add(record["digest"])
    yield from (f"version {v} has several weights" for v, found in digests.items() if len(found) > 1)
    if set(digests) != set(range(len(files.updates) + 1)):
        yield f"versions {sorted(digests)} were published in {len(files.updates)} updates"


def checkpoints(files: RunFiles) -> Iterator[str]:
    """A checkpoint is whole, and its state is a prefix of the ledger and of the records."""
    done_at = {record["update"]: record["seq"] for record in files.updates} | {len(files.updates) + 1: 2**53}
    for checkpoint in find_checkpoints(files.folder):
        if fault := verify(checkpoint, to_resume=True):
            yield fault
            continue
        name, state = checkpoint.path.name, json.loads((checkpoint.path / STATE).read_text())
        position, aside = state["cursor"]["position"], set(state["cursor"]["set_aside"])
        before = {lease for update, lease in files.trained if update <= checkpoint.update}
        after = {lease for update, lease in files.trained if update > checkpoint.update}
        if not (max(before) < position <= min(after, default=position)) or aside & (before | after):
            yield f"{name}: its cursor {state['cursor']} is not where the ledger has been divided"
        if not done_at[checkpoint.update] <= state["records"] < done_at[checkpoint.update + 1]:
            yield f"{name}: has {state['records']} records, update {checkpoint.update} is {done_at[checkpoint.update]}"
    made = {checkpoint.update for checkpoint in find_checkpoints(files.folder)}
    if unrecorded := made - {record["update"] for record in files.of("checkpoint")}:
        yield f"checkpoints without a record: {sorted(unrecorded)}"


def scores(files: RunFiles) -> Iterator[str]:
    """The best mark names what has the best recorded score: a checkpoint that is there, or the base model."""
    path = files.folder / "best.json"
    if not path.exists():
        return
    marked = json.loads(path.read_text())
    value = marked["score"]["value"]
    scored = {record["update"]: record["score"]["value"] for record in files.of("eval")}
    if marked["update"] and not (files.folder / marked["checkpoint"]).is_dir():
        yield f"the best checkpoint is {marked['checkpoint']}, which is not there"
    if scored.get(marked["update"]) != value or value < max(scored.values()):
        yield f"marked {marked['update']} with {value}, scores are {scored}"


def _first_step(numbers: list[int]) -> str:
    """Where a rising list falls, repeats or jumps for the first time."""
    for before, after in pairwise(numbers):
        if after != before + 1:
            return f"… {before}, {after} …"
    return f"begins with {numbers[:1]}"
