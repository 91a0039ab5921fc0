import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import io
import os
import random
import unicodedata
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import regex
from gguf_files import CONTROL, FILLERS, MERGES, TOKENS, TOOL, Tiny, byte_letters, write
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from grpo_actors.convert.gguf import tokenizer_json as rebuild
from grpo_actors.convert.gguf import write_folder
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.errors import ModelError
from grpo_actors.rundir.checkpoints import write_json

SAMPLES = [
    "Hello, world!",
    "The year 2024 had 366 days; 12345.678",
    "def f(x):\n    return x**2  # square\n\n\tprint('ok')\r\n",
    "naïve café — “quotes” 你好世界 🙂🚀 Ω≈ç√",
    "  leading and   many   spaces \n\n\n end  ",
    "I'M don't it's WE'LL they've x\u0301 ½ Ⅷ ٣",
    "",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [
        range(9, 14),
        *[range(32, 127)] * 4,
        range(160, 500),
        range(0x400, 0x430),
        range(0x4E00, 0x4E20),
    ]
    letters = [chr(code) for codes in ranges for code in codes] + list("🙂\u200b\u3000\u2028٣½Ⅷ\u0301")
    return ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(count)]


def loaded(tmp_path: Path, tiny: Tiny):
    """Return the converted folder's tokenizer, as mlx-lm loads it."""
    write(tmp_path / "tiny.gguf", tiny)
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(tmp_path / "tiny.gguf", folder, "float32")
    return mlx_lm.load(str(folder))[1]


def test_the_folder_carries_special_tokens_chat_template_and_stops(tmp_path):
    tokenizer = loaded(tmp_path, Tiny())
    assert [tokenizer.encode(text) for text in CONTROL] == [[0], [1], [2]]
    assert tokenizer.encode(f"a{TOOL}")[1:] == [TOKENS.index(TOOL)]
    assert tokenizer.eos_token_ids == {2, 0}
    assert (
        tokenizer.decode(tokenizer.encode(f"<|im_start|>hello{TOOL}<|im_end|>"), skip_special_tokens=True)
        == f"hello{TOOL}"
    )
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert tokenizer.decode(asked) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    # 1 + 'user' + newline + one token for 'hello'
    assert asked[:7] == [1, *tokenizer.encode("user"), TOKENS.index("Ċ"), TOKENS.index("hello")]


def test_rows_without_a_token_have_no_text(tmp_path):
    tokenizer = loaded(tmp_path, Tiny())
    assert FILLERS[0] not in tokenizer.get_vocab()
    assert len(tokenizer.encode(FILLERS[0])) == len(FILLERS[0])


# --- byte-level BPE ---

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def bpe_by_hand(text: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Tokenise by an independent copy of SmolLM2's rule: single digits, GPT-2's words, lowest merge first."""
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    letters, out = byte_letters(), []
    for piece in regex.split(r"(\p{N})", text):
        for word in regex.findall(GPT2, piece):
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = list(pairwise(parts))
                rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairs))
                if rank == len(ranks):
                    break
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            # A letter that is not a token is dropped.
            out += [ids[part] for part in parts if part in ids]
    return out


def test_smollm_ids_equal_bpe_written_by_hand(tmp_path):
    tokenizer = loaded(tmp_path, Tiny())
    for text in [*SAMPLES, "hello world hello  12 \n\n\n", *random_texts(200)]:
        assert tokenizer.encode(text) == bpe_by_hand(text, TOKENS, MERGES)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_text_comes_back_unchanged(tmp_path, architecture):
    tokenizer = loaded(tmp_path, Tiny(architecture))
    for text in [*SAMPLES, *random_texts(100)]:
        # Qwen 2 composes letters and accents first (NFC).
        composed = unicodedata.normalize("NFC", text) if architecture == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == composed


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        # GPT-2 keeps 1234 whole, smollm cuts each digit off, llama-bpe takes three, qwen2 one at a time.
        ("gpt-2", ["x", "Ġ1234", "Ġ(", "y", ")", "ĊĊ"]),
        ("smollm", ["x", "Ġ", "1", "2", "3", "4", "Ġ(", "y", ")", "ĊĊ"]),
        ("llama-bpe", ["x", "Ġ", "123", "4", "Ġ(", "y", ")ĊĊ"]),
        ("smaug-bpe", ["x", "Ġ", "123", "4", "Ġ(", "y", ")ĊĊ"]),
        ("qwen2", ["x", "Ġ", "1", "2", "3", "4", "Ġ(", "y", ")ĊĊ"]),
    ],
)
def test_each_rule_splits_text_in_its_own_way(tmp_path, pre, pieces):
    write(tmp_path / "tiny.gguf", Tiny(metadata={"tokenizer.ggml.pre": pre}))
    written = rebuild.read(GgufFile(tmp_path / "tiny.gguf"), 288)
    found = Tokenizer.from_str(written.tokenizer_json).pre_tokenizer.pre_tokenize_str("x 1234 (y)\n\n")
    assert [piece for piece, _ in found] == pieces


def test_transformers_own_qwen2_tokenizer_reads_the_same_ids(tmp_path):
    tokenizer = loaded(tmp_path, Tiny("qwen2"))
    assert type(tokenizer._tokenizer).__name__ == "Qwen2Tokenizer"
    written = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in [*SAMPLES, *random_texts(200)]:
        assert tokenizer.encode(text) == written.encode(text).ids


@pytest.mark.parametrize(("entry", "first"), [(True, [1]), (False, []), (None, [1])])
def test_bos_is_added_if_the_file_or_llama_3s_rule_requires_it(tmp_path, entry, first):
    metadata = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": entry}
    tokenizer = loaded(tmp_path, Tiny(metadata=metadata))
    assert tokenizer.encode("x") == [*first, TOKENS.index("x")]


# --- SentencePiece ---


def train_sentencepiece(**own: Any):
    """Train a BPE model of 700 tokens on this file's text, with byte fallback, like Llama's."""
    with warnings.catch_warnings():
        # SWIG's types have no __module__, which Python 3.12 remarks on at import.
        warnings.simplefilter("ignore", DeprecationWarning)
        import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        **own,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(pieces) -> dict:
    size = pieces.get_piece_size()
    kinds = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(size)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [float(pieces.get_score(i)) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": None,
    }


def test_sentencepiece_ids_and_text_equal_those_of_sentencepiece(tmp_path):
    pieces = train_sentencepiece()
    write(tmp_path / "tiny.gguf", Tiny(metadata=sentencepiece_metadata(pieces)))
    written = rebuild.read(GgufFile(tmp_path / "tiny.gguf"), pieces.get_piece_size())
    tokenizer = Tokenizer.from_str(written.tokenizer_json)
    for text in [*SAMPLES, "tokenizer.encode(text) == written", *random_texts(300)]:
        assert tokenizer.encode(text).ids == [1, *pieces.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_gemmas_runs_of_blanks_are_one_token_each_also_in_transformers(tmp_path):
    # Gemma puts no space before a text, and has tokens of its own for runs of spaces and newlines, which a GGUF
    # file marks as user-defined, with their spaces as spaces.
    runs = ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "\n\n\n"]
    pieces = train_sentencepiece(user_defined_symbols=runs, add_dummy_prefix=False)
    metadata = sentencepiece_metadata(pieces) | {"tokenizer.ggml.add_space_prefix": False}
    for run in runs:
        index = metadata["tokenizer.ggml.tokens"].index(run)
        metadata["tokenizer.ggml.tokens"][index] = run.replace("▁", " ")
        metadata["tokenizer.ggml.token_type"][index] = 4
    write(tmp_path / "tiny.gguf", Tiny("gemma3", metadata=metadata))
    written = rebuild.read(GgufFile(tmp_path / "tiny.gguf"), pieces.get_piece_size())
    write_json(tmp_path / "config.json", {"model_type": "gemma3_text"})
    write_json(tmp_path / "tokenizer_config.json", written.config)
    (tmp_path / "tokenizer.json").write_text(written.tokenizer_json)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("a    b", add_special_tokens=False)[1] == pieces.piece_to_id("▁▁▁▁")
    for text in [*SAMPLES, "    return x\n\n\n\n  y", *random_texts(300)]:
        assert tokenizer.encode(text) == [1, *pieces.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_sentencepiece_that_rewrites_the_text_is_refused(tmp_path):
    metadata = sentencepiece_metadata(train_sentencepiece()) | {
        "tokenizer.ggml.remove_extra_whitespaces": True
    }
    write(tmp_path / "tiny.gguf", Tiny(metadata=metadata))
    with pytest.raises(ModelError, match="rewrites the text first"):
        rebuild.read(GgufFile(tmp_path / "tiny.gguf"), 700)


# --- the real model: SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf ---

REAL = os.environ.get("SMOLLM2_GGUF", "")
WALL = (
    "The Great Wall of China is a series of fortifications that were built across the historical northern borders of "
    "ancient Chinese states and Imperial China as protection against various nomadic groups from the Eurasian Steppe. "
    "Several walls were built from as early as the 7th century BC, with selective stretches later joined together by "
    "Qin Shi Huang, the first emperor of China. Little of the Qin wall remains. Later on, many successive dynasties "
    "built and maintained multiple stretches of border walls."
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    write_folder(Path(REAL), folder, "float32")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SMOLLM2_GGUF is not set")
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is 2+2?", "4"),
        ("What color is the sky on a clear day?", "blue"),
    ],
)
def test_smollm2_knows_some_answers(smollm2, question, answer):
    model, tokenizer = mlx_lm.load(str(smollm2))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    assert answer in mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SMOLLM2_GGUF is not set")
def test_smollm2_predicts_english_well_and_badly_with_rows_in_stored_order(smollm2):
    model, tokenizer = mlx_lm.load(str(smollm2))
    ids = mx.array([tokenizer.encode(WALL)])

    def perplexity() -> float:
        logits = model(ids[:, :-1]).astype(mx.float32)
        chosen = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1).squeeze(-1)
        return float(mx.exp((mx.logsumexp(logits, axis=-1) - chosen).mean()))

    good = perplexity()
    stored = GgufFile(Path(REAL))
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight = mx.array(stored.read(f"blk.{number}.attn_q.weight"))
        layer.self_attn.k_proj.weight = mx.array(stored.read(f"blk.{number}.attn_k.weight"))
    assert good < 30
    assert perplexity() > 2 * good


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SMOLLM2_GGUF is not set")
def test_smollm2_ids_equal_bpe_written_by_hand_from_the_files_merges(smollm2):
    fields = gguf.GGUFReader(REAL).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.encode("Hello, world!") == [19556, 28, 905, 17]
    assert all(tokenizer.encode(token) == [index] for index, token in enumerate(tokens[:17]))
    for text in [*SAMPLES, *random_texts(100)]:
        assert tokenizer.encode(text) == bpe_by_hand(text, tokens, merges)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SMOLLM2_GGUF is not set")
def test_smollm2_weights_equal_those_that_mlx_reads(smollm2):
    stored, packed = GgufFile(Path(REAL)), mx.load(REAL)
    for name, info in stored.tensors.items():
        weight, stem = packed[name], name.removesuffix(".weight")
        if f"{stem}.scales" in packed:
            scales, biases = (packed[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            bits = weight.shape[1] * 32 // info.shape[1]
            weight = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
        assert np.array_equal(np.array(weight.astype(mx.float32)), stored.read(name))
