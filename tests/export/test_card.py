"""The card of an exported policy, from a run folder that a test has written."""

import json

import pytest
from checkpoint_files import write_checkpoint_files
from scores import report

from grpo_actors.config import Config
from grpo_actors.export.card import base_name, card
from grpo_actors.rundir.checkpoints import Checkpoint
from grpo_actors.rundir.scores import SavedScore, write_score


@pytest.fixture
def written(run_dir):
    """Return a function that writes the card of a run with these settings, and returns its text."""

    def write(form="model", base=None, after=None, start=None, **sections):
        config = Config.model_validate({"data": {"task": "arithmetic"}} | sections)
        (run_dir / "config.json").write_text(config.model_dump_json())
        path = run_dir / "checkpoint-7"
        checkpoint = Checkpoint(path if path.exists() else write_checkpoint_files(run_dir, 7), 7)
        for file, given in ((run_dir / "evaluation-base.json", base), (path / "evaluation.json", after)):
            if given is not None:
                write_score(file, SavedScore(report=given, values=[]))
        if start is not None:
            records = [{"topic": "start", "commit": "old"}, {"topic": "policy"}, {"topic": "start"} | start]
            lines = (
                json.dumps({"seq": seq, "time": 1.0} | record) + "\n" for seq, record in enumerate(records, 1)
            )
            (run_dir / "metrics.jsonl").write_text("".join(lines))
        return card(run_dir, config, checkpoint, name="mine", form=form)

    return write


def test_scores_stand_side_by_side_with_their_intervals(written):
    after = report(0.625, accuracy=0.75).model_copy(
        update={"sampled_reward": 1.25, "completion_length_mean": 12.6}
    )
    text = written(base=report(accuracy=0.5), after=after)
    assert "| | base | update 7 |\n|---|---|---|\n" in text
    assert "| accuracy, greedy | 50.0 % (0.0 to 100.0) | 75.0 % (0.0 to 100.0) |" in text
    assert "| reward, greedy | 1.000 | 1.000 |" in text
    # What one of the two has not measured is unknown, and what none has is left out.
    assert "| reward, sampled | ? | 1.250 |" in text
    assert "accuracy, sampled" not in text
    assert "| answers cut | 0.0 % | 0.0 % |" in text
    assert "| tokens an answer | 3 | 13 |" in text
    assert (
        "On 10 held-out problems of arithmetic, answered in at most 64 tokens, with 95 % intervals." in text
    )
    assert "Chosen by accuracy, greedy: 0.625 [0.525, 0.725]." in text


def test_scores_that_were_measured_differently_are_not_compared(written):
    text = written(base=report(digest="other"), after=report(accuracy=0.75))
    assert "| accuracy, greedy | ? | 75.0 % (0.0 to 100.0) |" in text


def test_without_a_score_the_card_says_so(written):
    assert "It has not been evaluated." in written(base=report())


@pytest.mark.parametrize(
    ("sections", "is_named"),
    [
        ({"data": {"task": "gsm8k"}}, True),
        ({"data": {"task": "arithmetic"}}, False),
        (
            {
                "data": {"task": "gsm8k", "sources": [{"name": "a"}]},
                "reward": {"functions": {"correctness": 1.0}},
            },
            False,
        ),
    ],
)
def test_the_data_set_of_the_hub_is_named_if_it_is_what_trained(written, sections, is_named):
    assert ("datasets:\n- openai/gsm8k\n" in written(**sections)) == is_named


@pytest.mark.parametrize(
    ("form", "relation", "library", "use"),
    [
        ("model", "finetune", "mlx", 'load("mine")'),
        ("adapter", "adapter", "mlx", 'load("owner/base", adapter_path="mine")'),
        ("peft adapter", "adapter", "peft", 'AutoPeftModelForCausalLM.from_pretrained("mine")'),
    ],
)
def test_the_header_names_the_base_on_the_hub_and_how_it_is_used(written, form, relation, library, use):
    text = written(form, model={"model_name": "owner/base"})
    tags = "tags:\n- grpo\n- reinforcement-learning\n- mlx\n---\n"
    head = f'---\nbase_model: "owner/base"\nbase_model_relation: {relation}\nlibrary_name: {library}\n'
    head += f"pipeline_tag: text-generation\n{tags}"
    assert text.startswith(head)
    assert f"{use}\n```" in text
    assert "# mine\n\nowner/base, trained with reinforcement learning (GRPO) on arithmetic: 7 updates" in text


def test_a_base_that_is_a_folder_is_named_by_its_name_also_where_it_is_gone(written, tmp_path):
    gone = Config.model_validate({"model": {"model_name": f"{tmp_path}/gone"}})
    assert base_name(gone) == "gone"
    assert "base_model" not in written(model={"model_name": f"{tmp_path}/gone"})


def test_the_prompt_of_the_training_is_told_with_who_adds_it(written):
    assert written().endswith("It was trained without a system prompt.\n")
    system = {"data": {"task": "arithmetic", "system_prompt": "Think."}}
    text = written(**system)
    assert (
        "It was trained with this system prompt:\n\n```text\nThink.\n```\n\nThe chat template adds it" in text
    )
    assert "`chat_template.jinja` in this folder adds it;" in written("adapter", **system)
    kwargs = {"data": {"task": "arithmetic", "chat_template_kwargs": {"words": "ä"}}}
    told = 'It was trained with these variables of the chat template: `{"words": "ä"}`.'
    assert told in written(**kwargs)
    both = {"data": system["data"] | kwargs["data"]}
    assert "Think.\n```\n\nAnd with these variables of the chat template: `{" in written(**both)


def test_what_made_it_is_told_as_far_as_it_was_recorded(written):
    assert "\n\nMade by grpo-actors of an unknown version.\n\n" in written()
    start = {
        "version": "1.2",
        "commit": "abc",
        "versions": {"grpo-actors": "1.2", "mlx": "0.1", "numpy": "2"},
    }
    rewards = {"config": {"reward": {"functions": {"strict_format": 2.0}}}}
    text = written(start=start | rewards)
    assert "\n\nMade by grpo-actors 1.2, commit `abc`, with mlx 0.1, numpy 2.\n\n" in text
    assert "| reward strict_format | `2.0` |" in text
    assert "Made by grpo-actors 1.2.\n" in written(start={"version": "1.2"})


def test_settings_without_a_value_or_an_effect_are_left_out(written):
    text = written(data={"task": "dataset", "path": "/home/me/sums.jsonl"})
    assert '| file | `"sums.jsonl"` |' in text
    assert "on dataset (sums.jsonl): 7 updates" in text
    assert "| num_shots | `0` |" in text
    assert "| clip_eps | `0.2` |" in text
    for absent in ("clip_delta", "system_prompt", "lora_rank", "/home/me", "cispo_cap", "| algorithm"):
        assert absent not in text
    adapted = written(model={"fine_tune_type": "lora"})
    assert "| lora_rank | `8` |" in adapted
    assert "lora_keys" not in adapted
