import json
import shutil

import pytest
from architectures import VOCABULARY, random_policy
from mlx import nn

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.generate.generator import Generator
from grpo_actors.policy.decoding.sampling import SamplingParams, grow_sample
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.embedding import embedding_rows
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy

#: Rows of the embedded model's embedding (assets/tiny/config.json): the first id that it cannot read.
ROWS = 320
USER = {"role": "user", "content": "2 + 3?"}


@pytest.fixture(scope="module")
def beyond(tmp_path_factory):
    """The embedded model with a token that its embedding has no row for, which its chat template puts before a user turn."""
    folder = shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("beyond") / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": ROWS, "content": "<|beyond|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|{{", "<|beyond|><|{{")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_policy(ModelConfig(model_name=str(folder)), seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gemma3n", "gemma4", "deepseek_v3", "rwkv7"])
def test_the_rows_are_those_of_the_embedding_of_tokens_not_of_positions_and_not_what_the_config_says(family):
    policy = random_policy(family)
    policy.architecture["vocab_size"] = 1_000
    assert embedding_rows(policy.model) == policy.readable == VOCABULARY


def test_quantised_and_adapted_embeddings_have_the_rows_of_the_plain_one():
    policy = random_policy("llama", hidden_size=64, head_dim=16)
    nn.quantize(policy.model, 64, 4)
    assert embedding_rows(policy.model) == VOCABULARY
    adapted = load_policy(ModelConfig(fine_tune_type="lora", lora_keys=("model.embed_tokens",)), seed=0)
    assert embedding_rows(adapted.model) == ROWS


def test_a_model_that_predicts_more_tokens_than_it_can_read_is_refused():
    policy = random_policy("llama")
    policy.model.lm_head = nn.Linear(32, VOCABULARY + 1)
    with pytest.raises(ModelError, match="predicts 65 token ids, but its embedding has 64 rows"):
        _ = policy.readable


def test_an_id_without_a_row_is_refused_wherever_it_enters(beyond):
    rule = f"has the token id {ROWS}, but the embedding has {ROWS} rows"
    with pytest.raises(ModelError, match=f"a prompt of its chat template {rule}"):
        beyond.chat.encode([USER])
    with pytest.raises(ModelError, match=f"a reply of role 'user' in its chat template {rule}"):
        encode_reply(beyond, USER, after_stop_token=True)
    params = SamplingParams(max_new_tokens=2)
    with pytest.raises(ModelError, match=f"a prompt {rule}"):
        Generator(beyond, params, seed=0).encode("a<|beyond|>b")
    with pytest.raises(ModelError, match=f"a prompt {rule}"):
        next(grow_sample(beyond, [5, ROWS], 0, params))
    with pytest.raises(ModelError, match="has the token id -1"):
        next(grow_sample(beyond, [5, -1], 0, params))


def test_the_last_row_is_read(beyond):
    assert next(grow_sample(beyond, [ROWS - 1], 0, SamplingParams(max_new_tokens=2))).tokens
