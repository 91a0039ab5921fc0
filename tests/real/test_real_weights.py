"""A real model's tokens and exports against the programs that it comes from.

    MODEL_DIR=… GSM8K_DIR=… TRANSFORMERS_4=…/python TRANSFORMERS_5=…/python python -m pytest -m slow tests/real

`MODEL_DIR` is a model folder, `GSM8K_DIR` has train.jsonl and test.jsonl, and the other two are Python interpreters with
torch and a version of transformers. What is not given is skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from grpo_actors.config import ModelConfig
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.model import AS_STORED, load_base
from grpo_actors.rundir.checkpoint_weights import write_model

pytestmark = pytest.mark.slow

TOKENS = 24
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer with one number."},
        {"role": "user", "content": "What is 12 + 34?"},
    ],
    [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "Another one, with its colour in 3 words: naïve, 你好 🙂?"},
    ],
]


def given(name: str) -> Path:
    """Return the path in an environment variable; the test is skipped if it is not set."""
    if not os.environ.get(name):
        pytest.skip(f"{name} is not set")
    return Path(os.environ[name])


@pytest.fixture(scope="module")
def policy():
    return load_base(ModelConfig(model_name=str(given("MODEL_DIR"))), dtype="float32")


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_of_gsm8k_has_the_tokens_of_tokenizer_json(policy, split):
    file = Tokenizer.from_file(str(given("MODEL_DIR") / "tokenizer.json"))
    lines = (given("GSM8K_DIR") / f"{split}.jsonl").read_text("utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line).values()]
    assert len(texts) == {"train": 2 * 7473, "test": 2 * 1319}[split]
    expected = [encoded.ids for encoded in file.encode_batch(texts, add_special_tokens=False)]
    assert [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts] == expected
    assert [policy.decode(ids) for ids in expected] == texts


@pytest.fixture(scope="module")
def ours(policy):
    """Prompts and greedy answers of the policy."""
    prompts = [policy.chat.encode(chat) for chat in CHATS]
    params = SamplingParams(TOKENS, temperature=0.0)
    return prompts, [sample_groups(policy, [prompt], [[0]], params)[0][0].tokens for prompt in prompts]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The model as an export writes it."""
    folder = tmp_path_factory.mktemp("export")
    write_model(folder, load_base(ModelConfig(model_name=str(given("MODEL_DIR"))), dtype=AS_STORED))
    return folder


@pytest.mark.parametrize("version", ["4", "5"])
def test_transformers_loads_the_export_and_gives_the_same_greedy_answers(ours, export, version):
    command = [
        str(given(f"TRANSFORMERS_{version}")),
        str(Path(__file__).with_name("greedy.py")),
        str(export),
        str(TOKENS),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, input=json.dumps(CHATS), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)
    assert theirs["version"].startswith(f"{version}.")
    assert (theirs["prompts"], theirs["answers"]) == ours
