"""What is read of a model without its weights: from headers and from config.json."""

import json
from dataclasses import astuple

import pytest

from grpo_actors.errors import ModelError
from grpo_actors.supervisor.model_files import Tensor, Widths, read_tensors

#: The settings that every model has.
LEAST = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("more", "widths"),
    [
        # 96 / 6 = 16 numbers a head, keys and values of all heads, an MLP of four times the width.
        ({}, Widths(3, 96, 4 * 96, 6, 2 * 6 * 16, 0)),
        ({"vocab_size": 1000, "intermediate_size": 50}, Widths(3, 96, 50, 6, 2 * 6 * 16, 1000)),
        ({"num_key_value_heads": 2}, Widths(3, 96, 384, 6, 2 * 2 * 16)),
        ({"num_key_value_heads": None, "head_dim": None}, Widths(3, 96, 384, 6, 2 * 6 * 16)),
        # All heads together are wider than the residual stream, or not.
        ({"head_dim": 32}, Widths(3, 6 * 32, 384, 6, 2 * 6 * 32)),
        ({"head_dim": 8}, Widths(3, 96, 384, 6, 2 * 6 * 8)),
        # Of experts those count that one token uses.
        ({"num_experts_per_tok": 4, "moe_intermediate_size": 10}, Widths(3, 96, 40, 6, 192)),
        ({"num_experts_per_tok": 4, "intermediate_size": 30}, Widths(3, 96, 120, 6, 192)),
        ({"num_experts_per_tok": None}, Widths(3, 96, 384, 6, 192)),
        # Of the gated delta rule the values of all heads, or as many keys if those are wider.
        (
            {
                "linear_num_value_heads": 8,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 32,
                "full_attention_interval": 2,
            },
            Widths(3, 96, 384, 6, 192, delta=8 * 32, delta_layers=2),
        ),
        (
            {
                "linear_num_value_heads": 8,
                "linear_key_head_dim": 64,
                "linear_value_head_dim": 32,
                "layer_types": ["linear_attention", "full_attention", "full_attention"],
            },
            Widths(3, 96, 384, 6, 192, delta=8 * 64, delta_layers=1),
        ),
        # Linear attention of another kind is not that rule.
        ({"layer_types": ["linear_attention", "full_attention"]}, Widths(3, 96, 384, 6, 192)),
        ({"num_attention_heads": "6"}, Widths()),
        ({"linear_num_value_heads": 8}, Widths()),
        ({"num_key_value_heads": [2, 2, 2]}, Widths()),
    ],
)
def test_widths_are_read_from_config_json(more, widths):
    assert Widths.of(LEAST | more) == widths
    assert Widths.of({"model_type": "gemma3", "text_config": LEAST | more}) == widths


@pytest.mark.parametrize("missing", LEAST)
def test_without_a_width_that_every_model_has_none_is_known(missing):
    unknown = Widths.of({key: value for key, value in LEAST.items() if key != missing})
    assert set(astuple(unknown)) == {0}


def test_each_rank_computes_its_part_of_heads_and_mlp_and_the_whole_residual_stream():
    assert Widths(3, 96, 384, 6, 192, 1000).of_rank(2) == Widths(3, 96, 192, 3, 96, 1000)


@pytest.mark.parametrize(
    ("shape", "stored_bits", "bits", "size"),
    [
        ((32, 64), 0, 0, 2048 * 2),
        # A scale and an offset of 2 bytes for 64 weights.
        ((32, 64), 0, 4, 2048 / 2 + 2 * 2 * 32),
        ((32, 64), 3, 4, 2048 * 3 / 8 + 2 * 2 * 32),
        # Neither a vector nor what groups of 64 do not divide is quantised.
        ((64,), 0, 4, 64 * 2),
        ((32, 96), 0, 4, 32 * 96 * 2),
    ],
)
def test_the_bytes_of_a_tensor_in_a_process(shape, stored_bits, bits, size):
    assert Tensor("x", shape, stored_bits).bytes(2, bits) == size


def write(path, header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data)


def described(**shapes):
    return {name: {"dtype": "U32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("quantization", "shape", "bits"),
    [
        # 12 words of 32 bits are 48 weights of 8 bits, 96 of 4 and 128 of 3.
        ({}, (4, 48), 8),
        ({"bits": 4}, (4, 96), 4),
        ({"bits": 4, "a": {"bits": 3}}, (4, 128), 3),
        ({"bits": 4, "a": True}, (4, 96), 4),
    ],
)
def test_a_quantised_tensor_has_the_shape_of_its_weights_and_no_scales(tmp_path, quantization, shape, bits):
    parts = {"a.weight": [4, 12], "a.scales": [4, 2], "a.biases": [4, 2], "a.bias": [4]}
    write(tmp_path / "model-00001-of-00002.safetensors", {"__metadata__": {}} | described(**parts))
    write(tmp_path / "model-00002-of-00002.safetensors", described(**{"b.weight": [5, 6], "b.biases": [7]}))
    write(tmp_path / "adapters.safetensors", described(**{"c.weight": [8, 9]}))
    assert sorted(read_tensors(tmp_path, quantization), key=lambda tensor: tensor.name) == [
        Tensor("a.bias", (4,)),
        Tensor("a.weight", shape, bits),
        Tensor("b.biases", (7,)),
        Tensor("b.weight", (5, 6)),
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"x" * 100, "is not a safetensors file, or is cut off"),
        ((200).to_bytes(8, "little") + b"{}", "is not a safetensors file, or is cut off"),
        ((3).to_bytes(8, "little") + b"{}", "is not a safetensors file, or is cut off"),
        ((2).to_bytes(8, "little") + b"[]", "must hold a JSON object, got list"),
        ((2).to_bytes(8, "little") + b"{{", "cannot be read"),
    ],
)
def test_a_file_without_a_header_is_one_line(tmp_path, content, fault):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=fault) as caught:
        read_tensors(tmp_path, {})
    assert str(caught.value).startswith(f"model.model_name: {tmp_path / 'model.safetensors'} ")
    assert "\n" not in str(caught.value)
