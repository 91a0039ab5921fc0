"""The export of a finished run's policy, by the command that a user types."""

import json
import os
import subprocess
import sys
from functools import partial

import mlx.core as mx
import mlx_lm
import pytest
from commands import run_here
from hub import RIGHT, local_hub
from runs import ROOT, new_run

from grpo_actors.config import load_config
from grpo_actors.export.__main__ import main
from grpo_actors.policy.model import load_policy
from grpo_actors.rundir.naming import open_policy


@pytest.fixture
def export(tmp_path):
    """Return a function that runs the tool in the test's folder, and returns the finished process."""
    return partial(run_here, main, cwd=tmp_path)


@pytest.fixture
def export_process(tmp_path):
    """The same in a process of its own, without a token unless one is given: the hub's client reads it once."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}

    def run(*arguments, **variables):
        return subprocess.run(
            [sys.executable, "-m", "grpo_actors.export", *map(str, arguments)],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


SYSTEM = "Think."


@pytest.fixture(scope="module")
def lora_run():
    settings = {"fine_tune_type": "lora", "lora_rank": 4, "system_prompt": SYSTEM}
    with new_run(max_updates=2, eval_every_updates=0, **settings) as run:
        assert run.run() == 0, run.stderr
        yield run


def refusal(done) -> str:
    """Return the one line of the refusal."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    # A warning may come first: that no checkpoint of this short run beat the base model.
    *_, line = done.stderr.splitlines()
    return line.removeprefix("error: ")


def front_matter(card: str) -> str:
    return card.split("---\n")[1]


def test_the_best_checkpoint_becomes_a_model_folder_that_mlx_lm_loads(
    export_process, on_policy_run, tmp_path
):
    done = export_process(on_policy_run.folder, "--fuse", "out/model")
    assert done.returncode == 0, done.stderr
    best = json.loads((on_policy_run.folder / "best.json").read_text())["checkpoint"]
    if best == "base":  # which no checkpoint beat: the newest stands for the run
        best = "checkpoint-12"
    assert done.stdout == f"from    {on_policy_run.folder / best}\nwrote   out/model\n"
    exported, _ = mlx_lm.load(str(tmp_path / "out" / "model"))
    trained, _ = mlx_lm.load(str(on_policy_run.folder / best))
    ids = mx.array([[2, 21, 22, 15, 23]])
    assert mx.array_equal(exported(ids), trained(ids))
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= names
    assert not names & {"optimizer.safetensors", "state.json", "manifest.json"}


def test_its_card_states_base_data_objective_metrics_and_what_made_it(export, on_policy_run, tmp_path):
    assert export(on_policy_run.folder, "--fuse", "model", "--checkpoint", 12).returncode == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: mlx" in front_matter(card)
    assert "base_model" not in front_matter(card)  # the hub has no such model
    assert (
        "tiny, trained with reinforcement learning (GRPO) on arithmetic: 12 updates of 2 problems × 4" in card
    )
    assert '| loss | `"clip"` |' in card
    assert "| clip_eps |" in card
    assert "| cispo_cap |" not in card  # which this loss does not read
    assert "It was trained without a system prompt." in card
    assert "| reward correctness | `1.0` |" in card
    base = json.loads((on_policy_run.folder / "evaluation-base.json").read_text())
    after = json.loads((on_policy_run.folder / "checkpoint-12" / "evaluation.json").read_text())
    cells = [card_cell(scores["report"]) for scores in (base, after)]
    assert f"| accuracy, greedy | {cells[0]} | {cells[1]} |" in card
    start = on_policy_run.records("start")[0]
    assert f"mlx {start['versions']['mlx']}" in card
    assert start["commit"] is None or f"commit `{start['commit']}`" in card
    assert str(on_policy_run.folder.parent) not in card


def card_cell(scores) -> str:
    shown = [100 * scores[key] for key in ("accuracy", "accuracy_low", "accuracy_high")]
    return "{:.1f} % ({:.1f} to {:.1f})".format(*shown)


def test_an_adapter_leaves_alone_or_as_part_of_its_base(export, lora_run, tmp_path):
    assert export(lora_run.folder, "--adapter", "adapter").returncode == 0
    assert export(lora_run.folder, "--fuse", "model", "--dtype", "float32").returncode == 0
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapted, _ = mlx_lm.load(described["model"], adapter_path=str(tmp_path / "adapter"))
    fused, _ = mlx_lm.load(str(tmp_path / "model"))
    ids = mx.array([[2, 21, 22, 15, 23]])
    difference = mx.abs(adapted(ids).astype(mx.float32) - fused(ids))
    # In bfloat16, as the base is stored, one sum is rounded and the other is not: 2^-8 of a logit of some 20.
    assert difference.max().item() < 0.5
    assert "It has not been evaluated." in (tmp_path / "adapter" / "README.md").read_text()


def test_the_system_prompt_of_the_training_travels_with_every_form(export, lora_run, tmp_path):
    chat = [{"role": "user", "content": "1 + 2"}]
    asked = [{"role": "system", "content": SYSTEM}, *chat]
    for form, says in (
        ("fuse", "The chat template adds it"),
        ("adapter", "chat_template.jinja"),
        ("peft", ""),
    ):
        assert export(lora_run.folder, f"--{form}", form).returncode == 0
        assert f"```text\n{SYSTEM}\n```" in (card := (tmp_path / form / "README.md").read_text())
        assert says in card
        policy = open_policy(str(tmp_path / form))
        assert policy.chat.encode(chat) == policy.chat.encode(asked)


def test_a_prompt_is_answered_as_in_the_training_unless_no_system_is_given(lora_run, tmp_path):
    def prompt_tokens(model, *more):
        command = [sys.executable, "-m", "grpo_actors.generate", "1 + 2", "--model", model, "--json", *more]
        done = subprocess.run(
            [*command, "--max-tokens", "1"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert ("with the system prompt" in done.stderr) == (not more)
        return json.loads(done.stdout)["prompt_tokens"]

    with_system, without = (prompt_tokens(str(lora_run.folder), *more) for more in ((), ("--no-system",)))
    policy = load_policy(load_config(None).config.model, seed=0)
    chats = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "1 + 2"}]
    assert [with_system, without] == [len(policy.chat.encode(chat)) for chat in (chats, chats[1:])]


def test_an_adapter_for_peft_is_the_same_adapter_and_a_start(export, lora_run, tmp_path):
    assert export(lora_run.folder, "--adapter", "adapter").returncode == 0
    assert export(lora_run.folder, "--peft", "peft").returncode == 0
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (4, 4 * 20.0)
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "library_name: peft" in front_matter(card)
    assert 'AutoPeftModelForCausalLM.from_pretrained("peft")' in card
    ids = mx.array([[2, 21, 22, 15, 23]])
    one, other = (
        load_policy(load_config(None, [f"adapter_path={tmp_path / name}"]).config.model, seed=0).model(ids)
        for name in ("adapter", "peft")
    )
    assert mx.array_equal(one, other)


def test_all_weights_leave_as_mlx_lms_full_adapter(export, on_policy_run, tmp_path):
    assert export(on_policy_run.folder, "--adapter", "weights", "--checkpoint", "last").returncode == 0
    described = json.loads((tmp_path / "weights" / "adapter_config.json").read_text())
    assert described["fine_tune_type"] == "full"
    loaded, _ = mlx_lm.load(described["model"], adapter_path=str(tmp_path / "weights"))
    last = max(on_policy_run.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trained, _ = mlx_lm.load(str(last))
    ids = mx.array([[2, 21, 22, 15, 23]])
    assert mx.array_equal(loaded(ids), trained(ids))


def test_an_upload_sends_all_files_in_one_commit_and_leaves_nothing_here(
    export_process, on_policy_run, tmp_path
):
    with local_hub(private=["owner/model"]) as (address, repositories):
        repositories["owner/model"] = {
            "model-00001-of-00002.safetensors": b"of another model",
            "LICENSE": b"",
        }
        done = export_process(
            on_policy_run.folder, "--upload", "owner/model", HF_ENDPOINT=address, HF_TOKEN=RIGHT
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"sent    {address}/owner/model"
    sent = repositories["owner/model"]
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md", "LICENSE"} <= sent.keys()
    assert (
        "model-00001-of-00002.safetensors" not in sent
    )  # mlx_lm.load would take it for a part of this model
    assert b"# owner/model" in sent["README.md"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


def test_an_upload_is_private_unless_the_user_says_public(export_process, on_policy_run, tmp_path):
    with local_hub() as (address, repositories):
        hub = {"HF_ENDPOINT": address, "HF_TOKEN": RIGHT}
        repositories["owner/public"] = {}
        upload = [on_policy_run.folder, "--upload", "owner/public"]
        assert refusal(export_process(*upload, **hub)) == (
            "--upload: owner/public is public; add --public, or choose another repository"
        )
        assert repositories["owner/public"] == {}
        assert export_process(*upload, "--public", **hub).returncode == 0
        assert "config.json" in repositories["owner/public"]
        # A new repository is made private, or the check above would refuse it.
        assert export_process(on_policy_run.folder, "--upload", "owner/new", **hub).returncode == 0
        assert "config.json" in repositories["owner/new"]


def test_an_upload_without_a_token_writes_nothing(export_process, on_policy_run, tmp_path):
    line = refusal(export_process(on_policy_run.folder, "--fuse", "model", "--upload", "owner/model"))
    assert line == "--upload: there is no token of the hub; set HF_TOKEN, run hf auth login, or leave it out"
    assert not (tmp_path / "model").exists()


def test_an_upload_with_a_wrong_token_writes_nothing(export_process, on_policy_run, tmp_path):
    with local_hub() as (address, repositories):
        line = refusal(
            export_process(
                *(on_policy_run.folder, "--fuse", "model", "--upload", "owner/model"),
                HF_ENDPOINT=address,
                HF_TOKEN=RIGHT[::-1],
            )
        )
    assert line.startswith("--upload: the hub does not take the token")
    assert repositories == {}
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--upload", "model"], "--upload: must be owner/name, got 'model'"),
        ([], "nothing to do; add --fuse DIR"),
        (["--fuse", "model", "--checkpoint", "7"], "--checkpoint must be best, last or one of "),
        (["--peft", "model"], "trained all weights and has no adapter; take --fuse"),
        (["--peft", "model", "--dequantize"], "--peft takes the adapter as it is"),
        (["--adapter", "model", "--dequantize"], "--adapter takes the adapter as it is"),
        (["--gguf", "model.gguf", "--upload", "a/b"], "--upload sends folders"),
        (["--gguf", "model.gguf"], "the tokenizer must be a byte-level BPE"),
        (["--fuse", "."], "--fuse must name a folder to make"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    export, on_policy_run, tmp_path, arguments, words
):
    done = export(on_policy_run.folder, *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_and_a_run_without_a_checkpoint(export, on_policy_run, tmp_path):
    assert "is no run folder (config.json not found)" in refusal(export(tmp_path, "--fuse", "model"))
    settings = (on_policy_run.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(settings)
    assert "has no checkpoint yet" in refusal(export(tmp_path, "--fuse", "model"))


def test_a_damaged_checkpoint_is_not_exported(export, lora_run, tmp_path):
    weights = lora_run.folder / "checkpoint-2" / "adapters.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        line = refusal(export(lora_run.folder, "--fuse", "model"))
    finally:
        weights.write_bytes(sound)
    assert line.endswith(
        "not the file that was written (size or sha256 differs); choose another --checkpoint"
    )
    assert not (tmp_path / "model").exists()
