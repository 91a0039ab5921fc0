import json
import tomllib

from grpo_actors.config import load_config
from grpo_actors.config.show import as_json, as_text


def test_the_dry_runs_text_loads_back_to_the_same_configuration(tmp_path):
    # Text that is hard to escape: quotes, a backslash, a line break, a control character, umlauts.
    hard = 'say "ö"\\\n\x7f\t{}'
    loaded = load_config(
        None, ["stop=['a', '</b>']", "functions={'my.py:f' = 1, correct = 0.5}", "learning_rate=1e-9"]
    )
    data = loaded.config.data.model_copy(update={"system_prompt": hard})
    loaded = type(loaded)(loaded.config.model_copy(update={"data": data}), loaded.origins, loaded.notes)
    path = tmp_path / "dumped.toml"
    path.write_text(as_text(loaded), encoding="utf-8")
    assert load_config(path).config == loaded.config


def test_the_dry_run_says_where_each_value_came_from():
    lines = as_text(load_config(None, ["top_k=5"])).splitlines()
    (top_k,) = [line for line in lines if line.startswith("top_k")]
    (top_p,) = [line for line in lines if line.startswith("top_p")]
    assert top_k.split("#")[1].split("|")[0].strip() == "--set"
    assert top_p.split("#")[1].split("|")[0].strip() == "default"


def test_a_setting_that_is_not_set_is_shown_as_a_comment():
    text = as_text(load_config(None))
    assert "# clip_eps_high: not set" in text
    assert "clip_eps_high" not in tomllib.loads(text)["learner"]


def test_notes_and_the_memory_plan_are_shown_as_comments():
    text = as_text(load_config(None, ["lora_rank=4"]), memory_plan="learner 3 GB\nworker 1 GB")
    assert "# note: model.lora_rank has no effect" in text
    assert text.endswith("# memory: learner 3 GB\n# memory: worker 1 GB\n")


def test_the_json_form_holds_the_same():
    loaded = load_config(None, ["top_k=5"])
    shown = json.loads(as_json(loaded, memory_plan="x"))
    assert shown["config"] == json.loads(loaded.config.model_dump_json())
    assert shown["origins"]["rollout.top_k"] == "--set"
    assert (shown["notes"], shown["memory_plan"]) == ([], "x")


def test_the_rewards_that_score_are_shown_with_what_names_them():
    rewards = {"a": 0.5, "b": 2.0}
    text = as_text(load_config(None), rewards=rewards)
    assert text.endswith(
        "\n# reward: a, weight 0.5, from the task gsm8k\n# reward: b, weight 2, from the task gsm8k\n"
    )
    named = load_config(None, ["functions={a=0.5, b=2}"])
    assert "# reward: b, weight 2, from reward.functions\n" in as_text(named, rewards=rewards)
    assert json.loads(as_json(named, rewards=rewards))["rewards"] == rewards


def test_the_json_form_can_be_read_by_people_too():
    text = as_json(load_config(None, ["run_name=ö"]))
    assert text.startswith('{\n  "config": {\n    "run": {\n      "run_name": "ö",\n')
    assert text.endswith("\n}\n")


def test_every_choice_of_a_setting_is_listed():
    lines = as_text(load_config(None)).splitlines()
    (loss,) = [line for line in lines if line.startswith("optimizer =")]
    assert loss.endswith('(one of "adamw", "adam", "muon", "lion", "adafactor")')
    (bits,) = [line for line in lines if line.startswith("base_bits =")]
    assert bits.endswith("(one of 0, 4, 8)")
    (trackers,) = [line for line in lines if line.startswith("trackers =")]
    assert trackers.endswith('(one of "tensorboard", "wandb", "trackio")')
    assert json.loads(as_json(load_config(None)))["choices"]["model.base_bits"] == [0, 4, 8]
