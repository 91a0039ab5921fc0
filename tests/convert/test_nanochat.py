import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from nanochat_files import CONTEXT, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, Tiny, random_weights, write

from grpo_actors.config import ModelConfig
from grpo_actors.convert import __main__ as convert
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.logprobs import split_head
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.packed_rows import packs_rows

TOKENS = [VOCAB - 9, VOCAB - 8, 104, 256, 3, 270, 104, 257, 12, VOCAB - 7, VOCAB - 6]


def converted(source: Path, target: Path, *options: str) -> Path:
    arguments = ["--nanochat", str(source), "--output-dir", str(target), "--sample-tokens", "0", *options]
    assert convert.main(arguments) == 0
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model folder of the tiny checkpoint."""
    at = tmp_path_factory.mktemp("nanochat")
    return converted(write(at / "source", Tiny()), at / "model")


# --- nanochat's formulas, in NumPy and float64 --------------------------------------------------------


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def rotated(x: np.ndarray) -> np.ndarray:
    """Rotate [T, heads, D]: the halves of D form pairs, turned clockwise by position × 10000^(-2i/D)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * 10000.0 ** (-2 * np.arange(half) / x.shape[-1])
    one, other = x[..., :half], x[..., half:]
    return np.concatenate(
        [one * np.cos(angles) + other * np.sin(angles), other * np.cos(angles) - one * np.sin(angles)],
        axis=-1,
    )


def attention(x: np.ndarray, weights: dict[str, np.ndarray], at: str) -> np.ndarray:
    length, dim = len(x), HIDDEN // HEADS
    q, k, v = (
        (x @ weights[f"{at}.c_{part}.weight"].T).reshape(length, heads, dim)
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    q, k = norm(rotated(q)), norm(rotated(k))
    # Query heads 0 and 1 use key-value head 0; 2 and 3 use 1.
    k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / dim**0.5
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", shares, v).reshape(length, HIDDEN)
    return mixed @ weights[f"{at}.c_proj.weight"].T


def forward(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Return the logits [T, V] of nanochat's GPT."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    x = norm(weights["transformer.wte.weight"][tokens])
    for index in range(LAYERS):
        at = f"transformer.h.{index}"
        x = x + attention(norm(x), weights, f"{at}.attn")
        inner = np.maximum(norm(x) @ weights[f"{at}.mlp.c_fc.weight"].T, 0) ** 2
        x = x + inner @ weights[f"{at}.mlp.c_proj.weight"].T
    return 15 * np.tanh(norm(x) @ weights["lm_head.weight"].T / 15)


# --- the model ----------------------------------------------------------------------------------------


def test_the_folder_has_the_logits_of_nanochats_own_formulas(folder):
    model, _ = mlx_lm.load(str(folder))
    expected = forward(random_weights(), TOKENS)
    # The soft cap must have an effect: it maps 12 to 15 · tanh(12 / 15) = 10.
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(np.array(model(mx.array([TOKENS]))[0]), expected, atol=2e-3)


def test_the_config_has_the_sizes_of_the_meta_file(folder):
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (HIDDEN, 4 * HIDDEN)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (LAYERS, VOCAB)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["max_position_embeddings"], config["torch_dtype"]) == (CONTEXT, "float32")


def test_the_learner_packs_rows_and_uses_the_capped_logits(folder):
    policy = load_policy(ModelConfig(model_name=str(folder)), seed=0)
    assert packs_rows(policy.model)
    assert split_head(policy.model) is None  # body and head alone would leave out the cap


HALVES = {
    # bfloat16 is the upper half of float32; float16 rounds to the nearest number.
    "BFloat16Storage": lambda array: (array.view("<u4") & 0xFFFF0000).view("<f4"),
    "HalfStorage": lambda array: array.astype(np.float16).astype(np.float32),
}


@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_is_read_exactly(tmp_path, kind):
    kinds = {"transformer.wte.weight": kind, "lm_head.weight": kind}
    target = converted(write(tmp_path / "source", Tiny(kinds=kinds)), tmp_path / "model")
    arrays = mx.load(str(target / "model.safetensors"))
    for name, array in random_weights().items():
        expected = HALVES[kind](array) if name in kinds else array
        assert arrays[name].dtype == mx.float32
        assert np.array_equal(np.array(arrays[name]), expected), name


def test_a_compiled_model_with_padded_rows_is_the_same_model(folder, tmp_path):
    # torch.compile's prefix; VOCAB rows padded to a multiple of 64 with rows that belong to no token.
    weights = random_weights()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = np.concatenate([weights[name], np.full((-VOCAB % 64, HIDDEN), 7, np.float32)])
    compiled = {f"_orig_mod.{name}": array for name, array in weights.items()}
    target = converted(write(tmp_path / "source", Tiny(weights=compiled)), tmp_path / "model")
    ours, plain = (mx.load(str(at / "model.safetensors")) for at in (target, folder))
    assert ours.keys() == plain.keys()
    assert all(mx.array_equal(ours[name], plain[name]) for name in plain)


def test_the_newest_step_is_used_with_a_tokenizer_from_nanochats_own_folder(tmp_path):
    # NANOCHAT_BASE_DIR/chatsft_checkpoints/d2 and NANOCHAT_BASE_DIR/tokenizer
    source = tmp_path / "base" / "chatsft_checkpoints" / "d2"
    write(source, Tiny(weights=random_weights(seed=1), step=9))
    write(source, Tiny(weights=random_weights(seed=2), step=1000010))
    write(source, Tiny(weights=random_weights(seed=3), step=200))
    (tmp_path / "base" / "tokenizer").mkdir()
    (source / "tokenizer.pkl").rename(tmp_path / "base" / "tokenizer" / "tokenizer.pkl")
    target = converted(source, tmp_path / "model", "--dtype", "bfloat16")
    head = mx.load(str(target / "model.safetensors"))["lm_head.weight"]
    assert head.dtype == mx.bfloat16
    expected = mx.array(random_weights(seed=2)["lm_head.weight"]).astype(mx.bfloat16)
    assert mx.array_equal(head, expected)


def test_the_summary_names_step_and_sizes_and_the_model_answers(tmp_path, capsys):
    source = write(tmp_path / "source", Tiny())
    arguments = ["--nanochat", str(source), "--output-dir", str(tmp_path / "model"), "--sample-tokens", "4"]
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"nanochat, step 650, 0.2 MB, 2 layers, {VOCAB} tokens" in printed
    # Two matrices of 293 × 32; a layer has 32 × 32 twice, 16 × 32 twice and 128 × 32 twice.
    assert f"{2 * VOCAB * 32 + 2 * (2048 + 1024 + 8192):,} parameters" in printed
    assert "tokens/s" in printed


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_batch_samples_the_same_tokens_as_each_prompt_alone(folder, kind):
    policy = load_policy(ModelConfig(model_name=str(folder), fine_tune_type=kind), seed=0)
    prompts, seeds = [TOKENS, TOKENS[:3], TOKENS[2:9]], [[1, 2], [3], [4]]
    together = sample_groups(policy, prompts, seeds, SamplingParams(12))
    alone = [
        sample_groups(policy, [p], [s], SamplingParams(12))[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert [[s.tokens for s in group] for group in together] == [[s.tokens for s in group] for group in alone]
