"""What the reference says agrees with the code, and its figures with their sources."""

import re

import pytest
from pages import DOCS, Page
from site_builder import curves, memory
from site_builder.commands import markdown as commands
from site_builder.settings import markdown as settings

from grpo_actors.__main__ import COMMANDS
from grpo_actors.config.schema import OWNER
from grpo_actors.config.thresholds import HealthConfig
from grpo_actors.observe.records import FIELDS
from grpo_actors.rundir import folder


def test_every_setting_has_an_entry():
    assert re.findall(r"^```\{setting\} (\w+)\.(\w+) = ", settings(), re.MULTILINE) == [
        (section, leaf) for leaf, section in OWNER.items()
    ]


def test_every_command_and_its_options_have_an_entry():
    text = commands()
    assert re.findall(r"^## grpo (\w+)$", text, re.MULTILINE) == list(COMMANDS)
    train = text.partition("## grpo train\n")[2].partition("\n## ")[0]
    assert "```{option} --set KEY=VALUE\nOverride a setting, as rollout.num\\_generations=16" in train


def test_every_topic_and_field_has_a_row():
    text = Page(DOCS / "reference" / "events.md").text
    for topic, fields in FIELDS.items():
        table = text.partition(f"\n## {topic}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(fields)


#: Ends of the constants' names.
_NAMES_OF_FILES = ("_FILE", "TRACKERS_FOLDER", "MANIFEST", "STATE", "BEST")


def test_every_file_of_a_run_is_described():
    text = Page(DOCS / "reference" / "run-folder.md").source
    names = [value for name, value in vars(folder).items() if name.endswith(_NAMES_OF_FILES)]
    assert len(names) > 10
    assert [name for name in names if name not in text] == []


def test_every_threshold_of_the_alarms_is_explained():
    text = Page(DOCS / "reference" / "alarms.md").source
    assert [
        name for name in HealthConfig.model_fields if f"`{name}`" not in text and f"health.{name}" not in text
    ] == []


@pytest.mark.parametrize("name", list(curves.PICTURES))
def test_the_curves_are_those_of_the_recorded_numbers(name):
    assert (curves.FOLDER / f"{name}.svg").read_text() == curves.picture(name)


@pytest.mark.parametrize(
    ("model", "parameters"),
    # Embedding and head once if tied (V · h), else twice; each layer has q and o (2 h²), k and v (2 h · 128 · heads),
    # the MLP (3 h · i), biases of q, k and v, and two norms; one last norm.
    [
        (
            "qwen2.5-0.5b",
            151936 * 896 + 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864 + 896 + 256 + 2 * 896) + 896,
        ),
        (
            "qwen2.5-7b",
            2 * 152064 * 3584
            + 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944 + 3584 + 1024 + 2 * 3584)
            + 3584,
        ),
    ],
)
def test_the_memory_table_counts_the_parameters_of_the_real_models(model, parameters):
    plan, _ = memory.plan(model, "LoRA", memory.SEPARATE, memory.machine_of("metal", 2**34))
    assert plan.parameters == parameters


def test_a_larger_machine_never_has_less_room_and_a_smaller_model_never_needs_more():
    order = ["no", "tight", "one process", "GB"]

    def rank(model, method, machine):
        text = memory.cell(model, method, machine)
        return next(index for index, word in enumerate(order) if word in text)

    for machines in memory.MACHINES.values():
        for method in memory.METHODS:
            ranks = [
                [rank(model, method, machine) for machine in machines.values()] for model in memory.MODELS
            ]
            assert all(row == sorted(row) for row in ranks)
            assert all(list(column) == sorted(column, reverse=True) for column in zip(*ranks, strict=True))


def test_the_memory_table_says_no_where_a_run_is_refused():
    # The planner's own verdict: weights and training state must fit.
    machine = memory.machine_of("metal", 2**34)
    plan, _ = memory.plan("qwen2.5-3b", "all weights", memory.ALONE, machine)
    assert plan.learner.certain > machine.memory_bytes
    assert memory.cell("qwen2.5-3b", "all weights", machine) == "no"
