"""A whole run: what it must have done, recorded and left when it exits with 0."""

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from bounds import HANG_S
from runs import Run, new_run, wait_until

from grpo_actors.observe.records import FIELDS
from grpo_actors.schedule.order import ProblemOrder

OWN_REWARD = """
def short(prompts, completions, answer, topic, log_extra, log_metric, **columns):
    assert len(set(topic)) == 1
    log_extra("letters", [len(text) for text in completions])
    log_metric("longest", max(len(text) for text in completions))
    print("scored", answer[0])  # noise that must not end up in the records
    return [1.0 / (1 + len(text)) for text in completions]  # the prompts are texts
"""
PROBLEMS = [{"ask": f"What is {n} + {n}?", "right": 2 * n, "topic": "sum"} for n in range(30)]


@pytest.fixture(scope="module")
def own_run() -> Iterator[Run]:
    """Two workers, own data and own reward, max_staleness = 1, and a reader of the events from start to end."""
    settings = {
        "workers": 2,
        "max_staleness": 1,
        "task": "jsonl",
        "path": "problems.jsonl",
        "prompt_column": "ask",
        "answer_column": "right",
        "max_updates": 10,
        "eval_every_updates": 5,
        "save_steps": 5,
    }
    with new_run(**settings) as run:
        here = run.folder.parent
        (here / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
        (here / "own.py").write_text(OWN_REWARD)
        run.start("--set", 'reward.functions={"own.py:short"=1.0, correctness=2.0}')
        wait_until((run.folder / "endpoints.json").exists, "the learner listens")
        tail = run.tail()
        assert run.end() == 0, run.stderr
        run.tailed, _ = tail.communicate(timeout=HANG_S)
        yield run


@pytest.fixture(scope="module")
def small_run() -> Iterator[Run]:
    """A run in the learner's process only, over tcp: an adapter, the KL term, several passes over a batch."""
    settings = {
        "workers": 0,
        "fine_tune_type": "lora",
        "kl_coeff": 0.1,
        "num_iterations": 2,
        "scheme": "tcp",
        "max_staleness": 0,
        "learning_rate": 1e-2,
    }
    with new_run(**settings) as run:
        run.settings["keys_dir"] = str(run.folder.parent / "keys")
        assert run.run() == 0, run.stderr
        yield run


@pytest.fixture(params=[pytest.param("own_run", marks=pytest.mark.gpu), "small_run", "on_policy_run"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def test_records_are_numbered_without_a_gap_and_end_with_the_stop(any_run):
    any_run.assert_no_gap_in_records()
    last = any_run.records()[-1]
    assert (last["topic"], last["reason"], last["exit_code"]) == ("stop", "all updates done", 0)
    assert any_run.updates() == any_run.settings["max_updates"]


def test_every_field_of_a_record_is_in_the_schema(any_run):
    common = {"seq", "time", "session", "topic", "nonfinite"}
    for record in any_run.records():
        assert record.keys() - common <= FIELDS[record["topic"]].keys()


def test_every_lease_is_consumed_once_and_in_order(any_run):
    leases = [lease for lease, *_ in any_run.ledger()]
    # Two groups an update: leases 0 and 1 make the first, and so on.
    assert leases == list(range(2 * any_run.updates()))


def test_the_ledger_names_the_problems_of_the_order_epoch_after_epoch(own_run):
    problems = [problem for _, epoch, problem, _ in own_run.ledger()]
    epochs = [epoch for _, epoch, _, _ in own_run.ledger()]
    # A tenth of 30 is held out; each epoch trains on a permutation of the rest.
    assert epochs == sorted(epochs)
    assert max(Counter(zip(epochs, problems, strict=True)).values()) == 1
    assert len(problems) == 20


def test_the_order_depends_on_the_seed_alone(on_policy_run):
    from grpo_actors.config import Config
    from grpo_actors.tasks.registry import load_task

    problems = load_task(Config.model_validate({"data": {"task": "arithmetic"}}).data, seed=0).problems(
        "train"
    )
    order = ProblemOrder(len(problems), seed=0)
    assert [p for _, _, p, _ in on_policy_run.ledger()] == [problems[order.at(s).index].id for s in range(24)]


def test_no_group_is_staler_than_allowed(any_run):
    bound = any_run.settings["max_staleness"]
    behind = [int(lag) for record in any_run.records("metrics") for lag in record["staleness"]]
    assert min(behind) >= 0
    assert max(behind) <= bound


def test_learner_and_workers_report_how_long_they_waited(any_run):
    records = any_run.records("metrics")
    assert all(0 <= record["learner_wait_share"] <= 1 for record in records)
    shares = [record["rollout_wait_share"] for record in records if record["rollout_wait_share"] is not None]
    assert shares
    assert all(0 <= share <= 1 for share in shares)


def measured(run, name):
    """Return the metric `name` of the updates in which a completion had an advantage; there must be one."""
    values = [record[name] for record in run.records("metrics") if record[name] is not None]
    assert values
    return values


def test_recorded_logprobs_are_the_learners(on_policy_run):
    # Staleness 0, float32: the same weights in two processes differ only by the order of additions.
    assert max(measured(on_policy_run, "logprob_gap_max")) < 1e-3


def test_base_and_checkpoints_are_evaluated_once_each(any_run):
    evaluated = [record["update"] for record in any_run.records("eval")]
    assert len(evaluated) == len(set(evaluated))
    assert set(evaluated) == {0, *(record["update"] for record in any_run.records("checkpoint"))}


def test_the_best_checkpoint_is_marked_and_still_there(any_run):
    best = json.loads((any_run.folder / "best.json").read_text())
    scores = {record["update"]: record["score"] for record in any_run.records("eval")}
    assert best["score"] == scores[best["update"]]
    assert best["score"]["value"] == max(score["value"] for score in scores.values())
    assert best["checkpoint"] == "base" or (any_run.folder / best["checkpoint"]).is_dir()


def test_the_newest_checkpoints_are_kept(any_run):
    assert any_run.checkpoints()[-1] == any_run.updates()
    # The newest three, and the best.
    assert len(any_run.checkpoints()) <= 4


def test_nothing_is_left_behind(any_run):
    any_run.assert_nothing_left()


def test_the_command_that_the_start_prints_works_in_a_shell_without_the_environment(any_run):
    (line,) = [line for line in any_run.stderr.splitlines() if line.startswith("  watch it: ")]
    done = subprocess.run(
        ["sh", "-c", f"{line.removeprefix('  watch it: ')} --json"],
        cwd=any_run.folder.parent,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )
    assert json.loads(done.stdout.splitlines()[-1])["topic"] == "stop"


def test_the_start_says_where_and_the_end_says_what_came_out(any_run):
    # On an NVIDIA GPU its kernels are compiled before.
    lines = [line for line in any_run.stderr.splitlines() if not line.startswith("compil")]
    first, *_, score, checkpoint, chat, rate, take = lines
    assert first == f"run folder {any_run.folder}"
    assert re.search(rf"grpo(_actors)? worker --attach {any_run.folder}( --allow |\n)", any_run.stderr)
    assert re.search(r"\d+% of the problems \([\d,]+\) are held out for evaluation", any_run.stderr)
    (prompt,) = [r["text"] for r in any_run.records("log") if r["text"].startswith("first prompt")]
    assert re.match(
        r'first prompt \(\d+ tokens; system prompt: [a-z ]+\): ".*<\|user\|>.*<\|assistant\|>', prompt
    )
    assert prompt in any_run.stderr
    loading, waiting, sampling = re.findall(r"^\[\d+:\d\d\] (.*)$", any_run.stderr, re.MULTILINE)
    assert loading.startswith("loading ")
    assert (waiting, sampling) == ("waiting for a worker", "waiting for the first batch")
    assert re.search(r"^worker \S+ joined on (CPU|GPU \d)$", any_run.stderr, re.MULTILINE)
    assert re.search(r"^checkpoint-\d+ is written, [\d.]+ [kM]B$", any_run.stderr, re.MULTILINE)
    assert [line.split(":")[0] for line in (chat, rate, take)] == [
        *("  chat with it", "  score it", "  take it along")
    ]
    best = json.loads((any_run.folder / "best.json").read_text())
    measure = best["score"]["measure"]
    how = "sampled at temperature 1" if measure["temperature"] else "greedy"
    assert score.startswith(f"{measure['metric']}, {how}, on {measure['problems']} held-out problems: ")
    if best["update"]:
        assert f"(best, update {best['update']}), " in score
        assert checkpoint == f"best checkpoint: {any_run.folder / best['checkpoint']}"
    else:
        assert ": no checkpoint beat the base model, " in score
        assert checkpoint.startswith(f"last checkpoint: {any_run.folder}/checkpoint-")


def test_what_holds_prompts_is_for_this_user_only(any_run):
    assert any_run.folder.stat().st_mode & 0o777 == 0o700
    for name in ("metrics.jsonl", "completions.jsonl", "config.json"):
        assert (any_run.folder / name).stat().st_mode & 0o777 == 0o600


def test_a_full_checkpoint_is_a_model_that_mlx_lm_loads(on_policy_run):
    from mlx_lm import generate, load

    model, tokenizer = load(str(on_policy_run.folder / "checkpoint-12"))
    assert isinstance(generate(model, tokenizer, "1 + 1 =", max_tokens=2), str)


def test_an_adapter_checkpoint_is_one_that_mlx_lm_loads(small_run):
    import mlx.core as mx
    from mlx_lm import load

    from grpo_actors.policy.locate import EMBEDDED

    folder = small_run.folder / f"checkpoint-{small_run.updates()}"
    assert not (folder / "model.safetensors").exists()
    model, _ = load(str(EMBEDDED), adapter_path=str(folder))
    base, _ = load(str(EMBEDDED))
    prompt = mx.array([[1, 2, 3]])
    assert not mx.allclose(model(prompt), base(prompt)).item()


def test_the_kl_term_sees_the_policy_leave_its_reference(small_run):
    kl = [record["kl"] for record in small_run.records("metrics")]
    # Measured in the last pass over a batch: after the first optimizer step the policy is not the reference.
    assert all(value >= 0 for value in kl)
    assert kl[-1] > 0


@pytest.mark.gpu
def test_both_workers_deliver(own_run):
    assert {worker for *_, worker in own_run.ledger()} == {"rollout-0", "rollout-1"}


def test_own_rewards_are_recorded_by_their_names_and_their_prints_go_to_the_terminal(own_run):
    for record in own_run.records("metrics"):
        assert set(record["rewards"]) == {"own.py:short", "correctness"}
        assert record["rewards"]["own.py:short"] > 0
    assert any(line.startswith("rollout-0: scored ") for line in own_run.stderr.splitlines())


def test_a_reader_sees_every_record_in_order(own_run):
    seen = [json.loads(line)["seq"] for line in own_run.tailed.splitlines()]
    assert all(after == before + 1 for before, after in pairwise(seen))
    assert seen == [record["seq"] for record in own_run.records()]


def test_samples_hold_the_texts_that_were_scored(own_run):
    samples = [json.loads(line) for line in (own_run.folder / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == own_run.updates()
    for sample in samples:
        for completion in sample["completions"]:
            # The formula of the reward, applied to the text in the same record.
            assert completion["rewards"]["own.py:short"] == pytest.approx(1 / (1 + len(completion["text"])))


def test_what_a_reward_logs_is_with_the_completions_and_in_the_metrics(own_run):
    samples = [json.loads(line) for line in (own_run.folder / "completions.jsonl").read_text().splitlines()]
    for sample in samples:
        assert [c["extra"] for c in sample["completions"]] == [
            {"letters": len(c["text"])} for c in sample["completions"]
        ]
    # Both groups of an update log their longest, and one of them is among the samples.
    for sample, record in zip(samples, own_run.records("metrics"), strict=True):
        longest = max(len(completion["text"]) for completion in sample["completions"])
        assert record["logged"].keys() == {"longest"}
        assert 2 * record["logged"]["longest"] >= longest


@pytest.mark.slow
def test_workers_with_quantised_weights_train(make_run):
    run = make_run(quantize_for_rollouts=True, workers=1)
    assert run.run() == 0, run.stderr
    run.assert_no_gap_in_records()
    # With four bits the worker samples from another policy; the record says how far it is off.
    assert min(measured(run, "logprob_gap_mean")) > 1e-4
