import json
from pathlib import Path

import pytest

from grpo_actors.config import load_config
from grpo_actors.config.wording import toml_value
from grpo_actors.errors import ConfigError, DataError
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import digest


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    sums = [{"question": f"{n}+1?", "answer": n + 1} for n in range(20)]
    free = [{"prompt": f"Write {n} words.", "limit": n} for n in range(10)]
    return write(tmp_path / "sums.jsonl", sums), write(tmp_path / "free.jsonl", free)


def config(sources=(), eval_sources=(), *more):
    return load_config(
        None,
        [
            "task=arithmetic",
            f"sources={toml_value(list(sources))}",
            f"eval_sources={toml_value(list(eval_sources))}",
            "functions={ correctness = 1.0, soft_format = 0.5 }",
            *more,
        ],
    ).config


def two(files, **first):
    sums, free = files
    return [
        {"name": "sums", "task": "dataset", "path": sums} | first,
        {"name": "free", "task": "dataset", "path": free, "prompt_column": "prompt"}
        | {"rewards": ["soft_format"], "system_prompt": "Be brief."},
    ]


def test_a_source_gives_its_name_to_its_problems_and_the_rest_is_as_alone(files):
    task = open_task(config([*two(files), {"name": "made"}]))
    sources = task.train_sources()
    assert list(sources) == ["sums", "free", "made"]
    problems = task.problems("train")
    assert len(problems) == sum(map(len, sources.values()))
    first = problems[0]
    assert (first.source, first.id[:10], first.columns["answer"]) == ("sums", "sums/data/", int(first.answer))
    starts = {p.source: p for p in (problems[0], problems[len(sources["sums"])], problems[-1])}
    assert starts["free"].messages[0] == {"role": "system", "content": "Be brief."}
    assert starts["free"].answer == ""
    assert starts["made"].id.startswith("made/")
    assert {problem.source for problem in task.problems("eval")} == {"sums", "free", "made"}
    assert len({problem.id for problem in problems[:100]}) == 100
    assert task.is_correct(f"<answer>{first.answer}</answer>", first)


def test_only_the_rewards_of_its_source_apply_to_a_problem(files):
    settings = config(two(files))
    task = open_task(settings)
    answer = "<reasoning>\n</reasoning>\n<answer>1</answer>"
    weights, of_sources = settings.reward.functions, settings.rewards_of_sources
    with Scorer(weights, timeout_s=10, of_sources=of_sources) as scorer:
        by_source = {
            name: scorer.score(problems[0], [answer]).rewards
            for name, problems in (
                (p[0].source, p) for p in (task.problems("train"), [task.problems("train")[-1]])
            )
        }
    assert by_source["free"] == {"correctness": [None], "soft_format": [1.0]}
    assert None not in by_source["sums"]["correctness"]


def test_evaluation_sources_replace_the_held_out_share(files):
    sums, free = files
    evaluation = [{"name": "words", "task": "dataset", "path": free, "prompt_column": "prompt"}]
    task = open_task(config((), evaluation, "task=dataset", f"path={sums}"))
    assert len(task.problems("train")) == 20, "nothing of it is held out"
    assert task.problems("train")[0].id == "data/1"
    assert {problem.source for problem in task.problems("eval")} == {"words"}
    assert len(task.problems("eval")) == 10


def test_prompts_on_both_sides_are_a_note(files):
    sums, _ = files
    evaluation = [{"name": "same", "task": "dataset", "path": sums}]
    task = open_task(config((), evaluation, "task=dataset", f"path={sums}"))
    assert task.notes == ["20 training prompts are also held out for evaluation: its scores are too high"]


def test_the_digest_is_that_of_the_contents_wherever_they_are(files, tmp_path):
    sums, _ = files
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text(Path(sums).read_text())
    here, there = (open_task(config(two(files, path=str(path)))).digest() for path in (sums, elsewhere))
    assert here == there
    elsewhere.write_text(elsewhere.read_text().replace('"answer": 7', '"answer": 0'))
    assert open_task(config(two(files, path=str(elsewhere)))).digest() != here
    alone = open_task(config((), (), "task=dataset", f"path={sums}"))
    assert alone.digest() == digest(alone.problems("train"))


def test_where_sources_are_evaluated_the_others_hold_nothing_out(files):
    first = two(files)[0]
    task = open_task(config([first], [{"name": "made"}], "functions={ correctness = 1.0 }"))
    assert {name: len(problems) for name, problems in task.train_sources().items()} == {"sums": 20}
    # A task that has held-out problems of its own gives these.
    alone = open_task(config())
    assert [p.id for p in task.problems("eval")[:3]] == [f"made/{p.id}" for p in alone.problems("eval")[:3]]
    assert task.notes == []


def test_prompts_that_are_too_long_are_left_out_of_their_source_by_their_full_name(files):
    task = open_task(config(two(files)))
    before = len(task.problems("train"))
    first = task.problems("train")[0].id
    last = task.problems("train")[-1]
    assert first.startswith("sums/")
    assert task.leave_out(lambda problem: problem.id == first) == 1
    assert len(task.problems("train")) == before - 1
    assert first not in {problem.id for problem in task.problems("train")}
    assert task.problems("train")[-1] == last
    assert len(task.train_sources()["sums"]) + len(task.train_sources()["free"]) == before - 1
    with pytest.raises(DataError, match=r"data\.sources: 'free' has no prompt that is short enough"):
        task.leave_out(lambda problem: problem.source == "free")


def test_problems_of_sources_are_one_sequence(files):
    problems = open_task(config(two(files))).problems("train")
    whole = list(problems)
    assert len(whole) == len(problems)
    assert problems[-1] == whole[-1]
    assert problems[1:-1:3] == whole[1:-1:3]
    for beyond in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            problems[beyond]


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ([{"name": "a"}, {"name": "a"}], 'data.sources must have another name for each source, got "a"'),
        ([{"name": "a", "rewards": ["speed"]}], "data.sources must name rewards of reward.functions"),
        ([{"name": "a", "weight": 1.0}, {"name": "b"}], "must have a weight for every source or for none"),
        (
            [{"name": "a", "task": "dataset"}],
            "data.sources a: data.path must name a file, folder, function or",
        ),
        ([{"name": "a", "weight": 0.0}], "data.sources[0]: weight must be a finite number > 0, got 0.0"),
        ([{"weight": 1.0}], "data.sources[0]: name must be given"),
        ([{"name": "a", "colour": 1}], "data.sources[0]: colour is not a setting"),
        ([1], "data.sources must be a list of tables with the settings name, weight, rewards, task"),
    ],
)
def test_a_wrong_source_is_one_line(sources, says):
    with pytest.raises(ConfigError) as caught:
        config(sources)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
