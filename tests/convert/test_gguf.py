import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import json
import re
import sys
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import FAMILIES, VOCAB, Tiny, write

from grpo_actors.convert.gguf import number_formats as blocks
from grpo_actors.convert.gguf import shards as weights
from grpo_actors.convert.gguf import tokenizer_json as tokenizer
from grpo_actors.convert.gguf import write_folder
from grpo_actors.convert.gguf.families import split_rotary_halves
from grpo_actors.convert.gguf.model_config import Architecture
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.errors import ModelError

IDS = mx.array([[1, 40, 70, 259, 12, 200, 2, 99]])


def converted(tmp_path: Path, tiny: Tiny, dtype: str = "float32"):
    """Return the source model, and the model that mlx-lm loads from the converted folder."""
    source = write(tmp_path / "tiny.gguf", tiny)
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(tmp_path / "tiny.gguf", folder, dtype)
    return source, *mlx_lm.load(str(folder))


def refused(tmp_path: Path, tiny: Tiny) -> str:
    write(tmp_path / "tiny.gguf", tiny)
    with pytest.raises(ModelError) as caught:
        write_folder(tmp_path / "tiny.gguf", tmp_path, "float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


#: Every format that the reference package reads; F32, F16 and BF16 are not block formats there.
READABLE = [Type.F32, Type.F16, *gguf.quants._type_traits]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q4_1, Type.Q6_K])
def test_logits_equal_those_of_the_source_model_with_dequantised_weights(tmp_path, architecture, kind):
    source, model, _ = converted(tmp_path, Tiny(architecture, kind))
    assert mx.array_equal(model(IDS), source(IDS))


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_format_that_the_reference_package_reads_is_converted(tmp_path, kind):
    source, model, _ = converted(tmp_path, Tiny(format=kind))
    assert mx.array_equal(
        model.model.layers[1].mlp.down_proj.weight, source.model.layers[1].mlp.down_proj.weight
    )
    assert mx.array_equal(model(IDS), source(IDS))


@pytest.mark.parametrize(
    "tiny", [Tiny(tied=False), Tiny(bias=True), Tiny("qwen2", tied=False), Tiny("qwen3", tied=False)]
)
def test_an_untied_head_and_biases_are_converted(tmp_path, tiny):
    source, model, _ = converted(tmp_path, tiny)
    assert mx.array_equal(model(IDS), source(IDS))


def test_a_file_may_mix_number_formats(tmp_path):
    formats = {"ffn_down.weight": Type.Q6_K, "attn_v.weight": Type.Q8_0, "token_embd.weight": Type.F16}
    source, model, _ = converted(tmp_path, Tiny(format=Type.Q4_1, formats=formats))
    assert mx.array_equal(model(IDS), source(IDS))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_rounds_each_weight_once(tmp_path, dtype, bits):
    source, model, _ = converted(tmp_path, Tiny(), dtype)
    made, meant = model.model.layers[1].mlp.up_proj.weight, source.model.layers[1].mlp.up_proj.weight
    assert str(made.dtype) == f"mlx.core.{dtype}"
    # Rounding to a significand of b bits errs by at most 2^-b of the value (normal range).
    assert mx.all(mx.abs(made.astype(mx.float32) - meant) <= 2.0**-bits * mx.abs(meant) + 1e-7).item()


def test_stored_rows_need_the_other_rotary_pairing(tmp_path):
    """The file's row order fits rotation of neighbouring rows; this check shares no code with the reader."""
    source = write(tmp_path / "tiny.gguf", Tiny())
    wanted = source(IDS)
    stored = GgufFile(tmp_path / "tiny.gguf")
    for number, layer in enumerate(source.model.layers):
        layer.self_attn.q_proj.weight = mx.array(stored.read(f"blk.{number}.attn_q.weight"))
        layer.self_attn.k_proj.weight = mx.array(stored.read(f"blk.{number}.attn_k.weight"))
    assert not mx.allclose(source(IDS), wanted, atol=1e-2)
    for layer in source.model.layers:
        layer.self_attn.rope.traditional = True
    assert mx.allclose(source(IDS), wanted, atol=1e-4)


def test_split_rotary_halves_on_one_head_of_six_rows():
    # Pairs (0,3) (1,4) (2,5) are stored side by side.
    assert split_rotary_halves(np.array([0, 3, 1, 4, 2, 5], np.float32), 1).tolist() == [0, 1, 2, 3, 4, 5]


def test_large_models_are_sharded_and_load_again(tmp_path):
    source = write(tmp_path / "tiny.gguf", Tiny())
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(tmp_path / "tiny.gguf", folder, "float32")
    (folder / "model.safetensors").unlink()
    stored = GgufFile(tmp_path / "tiny.gguf")
    weights.save(stored, Architecture(stored).slots(), folder, "float32", shard_bytes=1_000_000)
    # A layer has 256·(256 + 2·64 + 256 + 3·512) = 557,056 weights; two and the embedding are 4.8 MB.
    assert len(list(folder.glob("model-*.safetensors"))) >= 5
    assert all(shard.stat().st_size < 1_010_000 for shard in folder.glob("model-*.safetensors"))
    assert mx.array_equal(mlx_lm.load(str(folder))[0](IDS), source(IDS))


def test_a_shard_takes_what_just_fits(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny())
    stored = GgufFile(tmp_path / "tiny.gguf")
    slots = Architecture(stored).slots()
    whole = weights.total_bytes(slots, "float32")
    for limit, count in ((whole, 1), (whole - 1, 2)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        weights.save(stored, slots, folder, "float32", shard_bytes=limit)
        assert len(list(folder.glob("*.safetensors"))) == count
        index = folder / "model.safetensors.index.json"
        assert index.exists() == (count > 1)
    assert json.loads(index.read_text())["metadata"]["total_size"] == whole


# --- number formats ---


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_native_decoding_equals_the_reference_package(kind):
    rows = np.random.default_rng(3).normal(size=(6, 96)).astype(np.float32)
    raw = gguf.quants.quantize(rows, kind)
    decoded = blocks.decode(raw.view(np.uint8).ravel(), int(kind), rows.shape)
    assert np.array_equal(decoded, gguf.quants.dequantize(raw, kind).reshape(rows.shape))


@pytest.mark.parametrize(("kind", "steps"), [(Type.Q8_0, 254), (Type.Q4_0, 8), (Type.Q4_1, 15)])
def test_quantised_weights_come_back_within_one_step(kind, steps):
    # A block of 32 from -1 to 1, spanned in `steps` steps (Q4_0 has 16 over twice the largest: 8 a side).
    rows = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 32)
    decoded = blocks.decode(gguf.quants.quantize(rows, kind).ravel(), int(kind), rows.shape)
    assert np.abs(decoded - rows).max() <= 2 / steps + 1e-3


def test_a_q4_0_block_worked_out_by_hand():
    # Scale 0.5; every byte 0x9F: low half 15 -> (15 - 8)/2 = 3.5, high half 9 -> 0.5.
    raw = np.frombuffer(np.float16(0.5).tobytes() + b"\x9f" * 16, np.uint8)
    assert blocks.decode(raw, 2, (32,)).tolist() == [3.5] * 16 + [0.5] * 16


def test_a_q6_k_block_worked_out_by_hand():
    # Low nibbles 1, upper bits 0: 1 - 32 = -31; scale 2, unit 0.5: -31. 128 + 64 + 16 + 2 bytes.
    raw = np.frombuffer(b"\x11" * 128 + b"\x00" * 64 + b"\x02" * 16 + np.float16(0.5).tobytes(), np.uint8)
    assert blocks.decode(raw, int(Type.Q6_K), (256,)).tolist() == [-31.0] * 256


def test_rare_formats_without_the_gguf_package_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ModelError, match=r"GGML type 14 needs the gguf package: pip install 'grpo-actors\[gguf\]'"
    ):
        blocks.byte_count(14, (256,))


# --- rejected files ---


@pytest.mark.parametrize(
    ("tiny", "words"),
    [
        (Tiny(drop=("blk.1.ffn_up.weight",)), "tensor blk.1.ffn_up.weight is missing"),
        (Tiny(drop=("token_embd.weight",)), "tensor token_embd.weight is missing"),
        (
            Tiny(extra={"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}),
            "attn_q_norm.weight first, are not known",
        ),
        (Tiny(metadata={"llama.feed_forward_length": 511}), r"must have shape \(511, 256\)"),
        (Tiny(metadata={"llama.block_count": 4_000_000_000}), "blk.2.attn_norm.weight is missing"),
        (Tiny(metadata={"llama.block_count": None}), "llama.block_count is missing"),
        (Tiny(metadata={"llama.block_count": "two"}), "must be a usable int, got 'two'"),
        (Tiny(metadata={"llama.expert_count": 8}), "8 experts"),
        (Tiny(metadata={"split.count": 2}), "llama-gguf-split --merge"),
        (Tiny(metadata={"llama.rope.dimension_count": 16}), "got 16 and 32"),
        (Tiny(metadata={"llama.attention.head_count_kv": 3}), "3 key-value heads do not divide 8"),
        (Tiny(metadata={"llama.attention.head_count_kv": 0}), "0 key-value heads do not divide 8"),
        (Tiny(metadata={"llama.attention.head_count": 0}), "0 heads over 256 features make no attention"),
        (Tiny(metadata={"llama.attention.head_count": 257}), "257 heads over 256 features make no attention"),
        # A feature for each head is an attention, but its heads cannot be rotated.
        (Tiny(metadata={"llama.attention.head_count": 256}), "the even head dimension 1, got 1 and 1"),
        (Tiny(metadata={"llama.attention.head_count_kv": 1}), r"attn_k.weight must have shape \(32, 256\)"),
        (Tiny(metadata={"llama.attention.value_length": 16}), "got 32 and 16"),
        (Tiny(metadata={"llama.attention.key_length": 33}), "the even head dimension 33, got 33 and 33"),
        (
            Tiny("qwen2", metadata={"qwen2.attention.key_length": 16}),
            "qwen2 needs heads × head dimension = 256, got 8 × 16",
        ),
        (Tiny(extra={"rope_freqs.weight": np.ones(8, np.float32)}), "does not follow Llama 3's rule"),
        (
            Tiny(metadata={"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
            "longrope",
        ),
        (
            Tiny(extra={"rope_freqs.weight": np.arange(1, 17, dtype=np.float32)}),
            "does not follow Llama 3's rule",
        ),
        (
            Tiny(metadata={"tokenizer.ggml.pre": "viking"}),
            "pre must be one of gpt-2, smollm, .*, got 'viking'",
        ),
        (Tiny(metadata={"tokenizer.ggml.pre": None}), "tokenizer.ggml.pre is missing"),
        (Tiny(metadata={"tokenizer.ggml.model": "bert"}), "model must be one of gpt2, llama, got 'bert'"),
        (Tiny(metadata={"tokenizer.ggml.merges": ["q z"]}), "merge 'q z' does not join"),
        (Tiny(metadata={"tokenizer.ggml.eos_token_id": 9999}), "eos_token_id must be below 267, got 9999"),
        (Tiny(metadata={"tokenizer.ggml.eos_token_id": None}), "answers would never end"),
        (Tiny(metadata={"tokenizer.ggml.tokens": ["a"] * VOCAB}), "token 'a' stands twice"),
        (Tiny(metadata={"tokenizer.ggml.token_type": [9] * VOCAB}), "a type 1 to 6"),
        (Tiny(metadata={"tokenizer.ggml.token_type": [1] * (VOCAB - 1)}), "each of 288 tokens a type 1 to 6"),
        (Tiny(metadata={"tokenizer.ggml.tokens": [1] * VOCAB}), "tokens must be a list of texts"),
        (
            Tiny(
                metadata={
                    "tokenizer.ggml.tokens": [f"t{n}" for n in range(VOCAB + 1)],
                    "tokenizer.ggml.token_type": [1] * (VOCAB + 1),
                }
            ),
            "289 tokens do not fit 288 embedding rows",
        ),
        (Tiny(metadata={"tokenizer.ggml.eos_token_id": 267}), "eos_token_id must be below 267, got 267"),
        (Tiny(metadata={"tokenizer.ggml.merges": ["he"]}), "merge 'he' does not join"),
    ],
)
def test_a_file_that_is_not_a_known_whole_model_is_refused_in_one_line(tmp_path, tiny, words):
    line = refused(tmp_path, tiny)
    assert re.search(words, line), line


def test_an_unknown_architecture_is_answered_with_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="must be one of llama, smollm3, qwen2, qwen3, gemma3, got 'mamba'"):
        Architecture(GgufFile(tmp_path / "other.gguf"))


def test_a_weight_that_overflows_float16_is_refused(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny(metadata={}))
    stored = GgufFile(tmp_path / "tiny.gguf")
    slot = Architecture(stored).slots()[0]._replace(undo=lambda rows: rows * np.float32(1e6))
    with pytest.raises(ModelError, match=r"token_embd.weight is not finite as float16"):
        weights.save(stored, [slot], tmp_path, "float16")


def test_cutting_the_file_anywhere_is_noticed(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny(format=Type.Q8_0))
    whole = (tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 20, 25, *range(100, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            GgufFile(cut)


def is_refused(path: Path) -> bool:
    """Return whether the file is rejected in one line, not a whole model; any other exception fails the test."""
    try:
        architecture = Architecture(GgufFile(path))
        architecture.slots()
        architecture.config("float32")
        tokenizer.read(architecture.gguf, VOCAB)
    except ModelError as error:
        return "\n" not in str(error)
    return False


def test_flipped_bytes_in_the_header_give_a_model_or_a_refusal(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny(format=Type.Q8_0))
    whole = bytearray((tmp_path / "tiny.gguf").read_bytes())
    header = GgufFile(tmp_path / "tiny.gguf")._data_start
    rng, refusals = np.random.default_rng(5), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(4, header, 3):
            damaged[at] = rng.integers(256)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        refusals += is_refused(tmp_path / "bad.gguf")
    assert refusals > 200
