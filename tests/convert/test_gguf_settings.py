"""Settings in config.json beyond the sizes: rotary scaling, and Gemma 3's own settings."""

import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import struct

import numpy as np
import pytest
from gguf_files import HEAD_DIM, Tiny, write

from grpo_actors.convert.gguf.model_config import Architecture
from grpo_actors.convert.gguf.reader import MAX_NESTING, GgufFile
from grpo_actors.errors import ModelError

# --- rotary scaling ---


def test_llama_3_scaling_is_recovered_from_its_divisors(tmp_path):
    # The published rule with factor 8: an angle is divided by 8 where its wave is longer than 8192 tokens,
    # by nothing where it is shorter than 2048, and in between by 1 / ((1 - s)/8 + s), s = (8192/wave - 1)/3.
    waves = 2 * np.pi * 5000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    share = (8192 / waves - 1) / 3
    divisors = np.where(waves > 8192, 8.0, np.where(waves < 2048, 1.0, 1 / ((1 - share) / 8 + share)))
    write(tmp_path / "tiny.gguf", Tiny(extra={"rope_freqs.weight": divisors.astype(np.float32)}))
    scaling = Architecture(GgufFile(tmp_path / "tiny.gguf")).config("float32")["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == pytest.approx(8.0)


def test_yarn_and_linear_scaling_reach_the_config(tmp_path):
    entries = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    write(tmp_path / "tiny.gguf", Tiny(metadata={f"llama.{key}": value for key, value in entries.items()}))
    scaling = Architecture(GgufFile(tmp_path / "tiny.gguf")).config("float32")["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_positions_are_plain_with_ggmls_base_where_the_file_says_nothing(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny(metadata={"llama.rope.freq_base": None, "split.count": 1}))
    config = Architecture(GgufFile(tmp_path / "tiny.gguf")).config("float32")
    assert config["rope_theta"] == 10000.0
    assert "rope_scaling" not in config
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    write(tmp_path / "tiny.gguf", Tiny(metadata=linear))
    config = Architecture(GgufFile(tmp_path / "tiny.gguf")).config("float32")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_query_heads_that_share_no_key_have_as_many_key_heads(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny(metadata={"llama.attention.head_count_kv": None}))
    assert Architecture(GgufFile(tmp_path / "tiny.gguf")).config("float32")["num_key_value_heads"] == 8


# --- Gemma 3's own settings ---


def gemma_config(tmp_path, **entries: object) -> dict:
    metadata = {f"gemma3.{key.replace('__', '.')}": value for key, value in entries.items()}
    write(tmp_path / "tiny.gguf", Tiny("gemma3", metadata=metadata))
    return Architecture(GgufFile(tmp_path / "tiny.gguf")).config("float32")


def test_gemma_without_a_window_sees_the_whole_text_on_every_layer(tmp_path):
    assert gemma_config(tmp_path)["sliding_window_pattern"] == 6
    assert gemma_config(tmp_path, attention__sliding_window_pattern=3)["sliding_window_pattern"] == 3
    config = gemma_config(tmp_path, attention__sliding_window=None)
    # 128 is the longest text.
    assert (config["sliding_window_pattern"], config["sliding_window"]) == (1, 128)


def test_gemmas_local_base_is_that_of_the_file_if_it_has_one(tmp_path):
    assert gemma_config(tmp_path)["rope_local_base_freq"] == 10000.0
    assert gemma_config(tmp_path, rope__freq_base_swa=500.0)["rope_local_base_freq"] == 500.0


def test_gemma_scales_queries_by_the_head_dimension_except_in_its_27b_model(tmp_path):
    assert gemma_config(tmp_path)["query_pre_attn_scalar"] == 64
    # The 27B model is recognised by its 62 layers; here 256 features over 8 heads.
    assert gemma_config(tmp_path, block_count=62)["query_pre_attn_scalar"] == 32


def test_gemma_with_capped_logits_is_refused(tmp_path):
    with pytest.raises(ModelError, match="final_logit_softcapping is not supported"):
        gemma_config(tmp_path, final_logit_softcapping=30.0)


def nested(depth: int) -> bytes:
    """An array of an array … of the int32 7: type and number of its items, then the items."""
    return struct.pack("<IQi", 5, 1, 7) if depth == 1 else struct.pack("<IQ", 9, 1) + nested(depth - 1)


def test_arrays_of_arrays_are_read_to_a_bound(tmp_path):
    path = tmp_path / "nested.gguf"
    # Version 3, no tensor, one entry; its key, and its type: an array.
    start = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(b"key")) + b"key" + struct.pack("<I", 9)
    path.write_bytes(start + nested(MAX_NESTING))
    assert GgufFile(path).metadata == {"key": [[[[7]]]]}
    path.write_bytes(start + nested(MAX_NESTING + 1))
    with pytest.raises(ModelError, match="unknown metadata type 9"):
        GgufFile(path)
