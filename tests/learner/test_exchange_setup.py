"""What the exchange of a run gets from its settings."""

import json

import pytest
from hand_made import MAX_NEW, config

from grpo_actors.config import Config, load_config
from grpo_actors.learner.exchange_setup import (
    _publish,
    build_lease_table,
    build_order,
    build_sampling_rules,
    build_selection,
    build_supply,
    build_welcome,
)
from grpo_actors.observe.records import encode, make_record
from grpo_actors.policy.thinking import Tags, Thinking
from grpo_actors.schedule.lease import Cursor
from grpo_actors.schedule.mixture import MixtureOrder
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.arithmetic import Arithmetic
from grpo_actors.tasks.registry import open_task
from grpo_actors.transport.sockets import Endpoints

#: Refills and oversampling beside groups that are replaced, or not.
SELECTION = {"refill_limit": 3, "oversampling": 1.3}


def settings(*, selection=None, rollout=None, **more):
    return Config.model_validate(
        {
            "learner": {"batch_size": 4, "gradient_accumulation_steps": 1},
            "rollout": {"lease_timeout_s": 70.0, "batch_groups": 2, "max_staleness": 1} | (rollout or {}),
            "selection": SELECTION | (selection or {}),
        }
        | more
    )


@pytest.mark.parametrize(
    ("selection", "refill_limit", "ahead"),
    [
        ({"dynamic_sampling": True}, 12, 6),  # 3 times the 4 groups of an update; 1.3 times, rounded up
        ({"dynamic_sampling": False}, 0, 4),
    ],
)
def test_refills_and_leases_ahead_are_counted_in_updates(selection, refill_limit, ahead):
    cursor = Cursor(7, (9,))
    table = build_lease_table(settings(selection=selection), version=2, total_updates=5, cursor=cursor)
    assert (table.refill_limit, table.ahead) == (refill_limit, ahead)
    assert (table.groups_per_update, table.batch_groups, table.max_staleness) == (4, 2, 1)
    assert (table.version, table.last_version, table.cursor) == (2, 5, cursor)


@pytest.mark.parametrize(("in_flight", "timeout_s"), [(False, 70.0), (True, 140.0)])
def test_a_lease_has_its_time_for_each_run_that_a_worker_samples_before_it(in_flight, timeout_s):
    config = settings(rollout={"in_flight_updates": in_flight})
    table = build_lease_table(config, version=0, total_updates=5, cursor=Cursor())
    # Its worker holds two runs, or with in-flight updates three: one or two wait.
    assert table.lease_timeout_s == timeout_s


def mixture(*weights):
    sources = [
        {"name": f"s{n}", "task": "arithmetic", "max_train_samples": 4 + 2 * n}
        | ({} if weight is None else {"weight": weight})
        for n, weight in enumerate(weights)
    ]
    return settings(data={"sources": sources}, reward={"functions": {"correctness": 1.0}})


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (mixture(3.0, 1.0), MixtureOrder((4, 6), (3, 1), 0, True)),
        (mixture(None, None), MixtureOrder((4, 6), (4, 6), 0, True)),  # every problem once
        (
            settings(run={"seed": 5}, data={"task": "arithmetic", "max_train_samples": 4, "shuffle": False}),
            ProblemOrder(4, 5, False),
        ),
    ],
)
def test_problems_come_in_the_order_of_their_mixture_or_of_their_only_source(config, order):
    assert build_order(config, open_task(config)) == order


def test_completions_follow_the_settings(tiny):
    plain = build_sampling_rules(config(max_turns=3, think_tokens=0), tiny)
    assert (plain.max_new_tokens, plain.max_turns, plain.closing) == (MAX_NEW, 1, ())
    assert (plain.vocabulary, plain.stop_tokens, plain.rewards) == (
        tiny.vocabulary,
        tiny.stop_tokens,
        {"hand"},
    )
    tiny.thinking = Thinking(Tags("a", "b"), start=(5,), end=(6,), closing=(7, 6))
    assert build_sampling_rules(config(think_tokens=0), tiny).closing == ()
    assert build_sampling_rules(config(think_tokens=4), tiny).closing == (7, 6)
    turns = load_config(None, ["task=arithmetic", "environment=calculator", "max_turns=3"]).config
    assert build_sampling_rules(turns, tiny).max_turns == 3
    [stop] = tiny.stop_tokens
    text = tiny.tokenizer.encode("5 STOP", add_special_tokens=False)
    assert build_sampling_rules(config(stop=("STOP",)), tiny).ends(text)
    assert not plain.ends(text)
    assert plain.ends([*text, stop])


@pytest.mark.parametrize("on", [False, True])
def test_a_curriculum_goes_on_with_the_rates_of_the_checkpoint(tiny, on):
    chosen, task = settings(selection={"curriculum": on, "curriculum_floor": 0.5}), Arithmetic(0, 6, 6)
    supply, rates = build_supply(chosen, task, tiny), {"p": 0.25}
    curriculum = build_selection(chosen, task, supply, tiny, rates).curriculum
    if not on:
        assert curriculum is None
        return
    assert (curriculum.floor, curriculum.rates) == (0.5, rates)
    curriculum.record("p", 1.0)
    assert rates == {"p": 0.25}, "they are the archive's"


def test_whoever_joins_is_told_the_run(tiny):
    chosen = settings()
    welcome = build_welcome(chosen, "r", tiny.identity, Endpoints("c", "w", "e", 1), total_updates=9)
    assert (welcome.run_id, welcome.weights_endpoint, welcome.total_updates) == ("r", "w", 9)
    assert Config.model_validate_json(welcome.config) == chosen
    assert json.loads(welcome.identity)["weights"] == tiny.identity.weights


class Listener:
    """Keeps what is published."""

    def __init__(self):
        self.lines = []

    def publish(self, topic, line):
        self.lines.append((topic, line))


@pytest.mark.parametrize(
    ("transport", "with_texts"),
    [
        ({}, True),
        ({"scheme": "tcp", "host": "127.0.0.1"}, True),
        ({"scheme": "tcp", "host": "192.0.2.1"}, False),
        ({"scheme": "tcp", "host": "192.0.2.1", "events_text": True}, True),
    ],
)
def test_other_hosts_hear_numbers_only_unless_the_settings_say_so(transport, with_texts):
    listener = Listener()
    line = encode(make_record(1, 0.0, "sample", {"prompt": "private", "update": 3}, "s"))
    _publish(settings(transport=transport), listener)("sample", line)
    [(topic, told)] = listener.lines
    assert topic == "sample"
    assert (b"private" in told, b'"update":3' in told.replace(b" ", b"")) == (with_texts, True)
