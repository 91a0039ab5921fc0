"""The checker itself: it finds each kind of broken promise in a small run folder written by hand."""

import json
import shutil

import pytest
from checker import broken_promises
from checkpoint_files import write_checkpoint_files
from scores import score

from grpo_actors.rundir.checkpoints import write_json

#: Two updates of two groups of two completions; lease 2 was set aside. Staleness 1.
TRAINED = {1: [0, 1], 2: [3, 4]}
CURSOR = {"position": 2, "set_aside": []}


def records():
    numbered = [
        {"topic": "start"},
        {"topic": "policy", "version": 0, "digest": "a"},
        {"topic": "metrics", "update": 1},
        {"topic": "policy", "version": 1, "digest": "b"},
        {"topic": "alarm", "name": "problem set aside", "text": "p2: three workers died (lease 2)"},
        {"topic": "checkpoint", "update": 1},
        {"topic": "eval", "update": 1, "score": score(0.25).model_dump()},
        {"topic": "metrics", "update": 2},
        {"topic": "policy", "version": 2, "digest": "c"},
    ]
    for seq, record in enumerate(numbered, 1):
        record["seq"] = seq
        if record["topic"] == "metrics":
            leases = TRAINED[record["update"]]
            record["ledger"] = [[lease, 0, f"p{lease}", "rollout-0"] for lease in leases]
            record |= {"groups_passed_over": None, "problems_skipped": None}
    return numbered


def groups():
    sampled = [{"versions": [0, 0]}, {"versions": [0, 1]}]
    return [
        {"update": update, "lease": lease, "completions": sampled[: 1 if update == 1 else 2] * (3 - update)}
        for update, leases in TRAINED.items()
        for lease in leases
    ]


class HandMade:
    """A run folder, whose records and groups a test may change before it writes them."""

    def __init__(self, folder):
        self.folder, self.records, self.groups = folder, records(), groups()
        self.config = {"rollout": {"num_generations": 2, "max_staleness": 1}}

    def of(self, topic, count=0):
        return [record for record in self.records if record["topic"] == topic][count]

    def checkpoint(self, **state):
        write_checkpoint_files(self.folder, 1, **{"cursor": CURSOR, "records": 4} | state)

    def broken(self):
        write_json(self.folder / "config.json", self.config)
        for name, lines in (("metrics", self.records), ("groups", self.groups)):
            (self.folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if not (self.folder / "checkpoint-1").exists():
            self.checkpoint()
        marked = {"checkpoint": "checkpoint-1", "update": 1, "score": score(self.best).model_dump()}
        write_json(self.folder / "best.json", marked)
        return broken_promises(self.folder)

    best = 0.25


@pytest.fixture
def made(tmp_path):
    return HandMade(tmp_path)


def test_a_run_that_held_everything(made):
    assert made.broken() == []


def drop_record(made):
    del made.records[4]


def repeat_score(made):
    made.records.append(made.of("eval") | {"seq": 10})


def train_twice(made):
    made.of("metrics", 1)["ledger"][0][:3] = [1, 0, "p1"]
    made.groups[2]["lease"] = 1


def lose_a_lease(made):
    made.of("alarm")["text"] = "another (lease 7)"


def train_what_was_set_aside(made):
    made.of("alarm")["text"] = "p1 (lease 1)"


def lose_a_recorded_group(made):
    del made.groups[-1]


def cut_a_group(made):
    del made.groups[-1]["completions"][0]


def train_too_late(made):
    made.config["rollout"]["max_staleness"] = 0


def train_before_it_was_sampled(made):
    made.groups[0]["completions"][1]["versions"] = [0, 1]


def publish_other_weights(made):
    made.records.append({"seq": 10, "topic": "policy", "version": 1, "digest": "x"})


def forget_a_version(made):
    made.of("policy", 1)["version"] = 0
    made.of("policy", 1)["digest"] = "a"


def checkpoint_ahead_of_the_ledger(made):
    made.checkpoint(cursor={"position": 4, "set_aside": []})


def checkpoint_behind_the_ledger(made):
    made.checkpoint(cursor={"position": 1, "set_aside": []})


def checkpoint_that_sets_aside_what_trained(made):
    made.checkpoint(cursor={"position": 2, "set_aside": [3]})


def checkpoint_with_later_records(made):
    made.checkpoint(records=8)


def damage_a_checkpoint(made):
    made.checkpoint()
    (made.folder / "checkpoint-1" / "state.json").write_text("{}")


def make_a_checkpoint_nobody_recorded(made):
    made.of("checkpoint")["update"] = 3


def mark_a_wrong_score(made):
    made.best = 0.5


def mark_a_worse_score(made):
    made.of("eval")["score"]["value"] = 0.3


def mark_a_missing_checkpoint(made):
    made.checkpoint()
    shutil.move(made.folder / "checkpoint-1", made.folder / "checkpoint-1.old")
    (made.folder / "checkpoint-1").write_text("")


@pytest.mark.parametrize(
    ("breaks", "promise"),
    [
        (drop_record, "numbering"),
        (repeat_score, "numbering"),
        (train_twice, "leases"),
        (lose_a_lease, "leases"),
        (train_what_was_set_aside, "leases"),
        (lose_a_recorded_group, "groups_trained"),
        (cut_a_group, "groups_trained"),
        (train_too_late, "staleness"),
        (train_before_it_was_sampled, "staleness"),
        (publish_other_weights, "one_digest_per_version"),
        (forget_a_version, "one_digest_per_version"),
        (checkpoint_ahead_of_the_ledger, "checkpoints"),
        (checkpoint_behind_the_ledger, "checkpoints"),
        (checkpoint_that_sets_aside_what_trained, "checkpoints"),
        (checkpoint_with_later_records, "checkpoints"),
        (damage_a_checkpoint, "checkpoints"),
        (make_a_checkpoint_nobody_recorded, "checkpoints"),
        (mark_a_wrong_score, "scores"),
        (mark_a_worse_score, "scores"),
        (mark_a_missing_checkpoint, "scores"),
    ],
)
def test_it_names_what_was_broken(made, breaks, promise):
    breaks(made)
    assert any(line.startswith(f"{promise}: ") for line in made.broken())
