"""Checkpoints that are damaged, hostile or of another model are refused: one line, exit code 2, no folder."""

import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import zipfile
from pathlib import Path

import numpy as np
import pytest
from nanochat_files import (
    VOCAB,
    Tiny,
    integer,
    name_of,
    random_weights,
    tensor,
    text,
    tuple_of,
    write,
    write_archive,
)
from test_convert import refusal

from grpo_actors.convert.nanochat.torch_file import TorchFile
from grpo_actors.errors import ModelError


def refused(tmp_path, capsys, source=None) -> str:
    line = refusal(capsys, "--nanochat", source or tmp_path / "source", "--output-dir", tmp_path / "model")
    assert not list(tmp_path.glob("model*"))
    return line


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model_000650.pt", "no model_*.pt here"),
        ("meta_000650.json", "meta_000650.json is missing beside it"),
        ("tokenizer.pkl", "no tokenizer.pkl in any of"),
    ],
)
def test_a_missing_file_is_named(tmp_path, capsys, missing, words):
    (write(tmp_path / "source", Tiny()) / missing).unlink()
    assert words in refused(tmp_path, capsys)


def test_a_file_given_as_folder_is_refused(tmp_path, capsys):
    source = write(tmp_path / "source", Tiny())
    assert "must name a folder" in refused(tmp_path, capsys, source / "model_000650.pt")


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"n_layer": None}, "model_config.n_layer must be a whole number ≥ 1, got None"),
        ({"n_layer": True}, "got True"),
        ({"n_head": 0}, "model_config.n_head must be a whole number ≥ 1, got 0"),
        ({"n_head": 3}, "must be an even multiple of n_head = 3"),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head = 4, got 3"),
        ({"vocab_size": VOCAB + 1}, f"must have the model's {VOCAB + 1} tokens"),
        ({"n_layer": 3}, "tensor transformer.h.2.attn.c_q.weight is missing"),
        ({"n_layer": 10**12}, "tensor transformer.h.2.attn.c_q.weight is missing"),
        ({"n_layer": 1}, "6 tensors are not known"),
        ({"n_embd": 64}, f"transformer.wte.weight must have shape ({VOCAB}, 64), got ({VOCAB}, 32)"),
        ({"window_pattern": "SSSL"}, "'window_pattern' = 'SSSL', a part of newer nanochats"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, capsys, meta, words):
    write(tmp_path / "source", Tiny(meta=meta))
    assert words in refused(tmp_path, capsys)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_config": 3}', "[" * 100_000])
def test_an_invalid_meta_file_is_refused(tmp_path, capsys, content):
    (write(tmp_path / "source", Tiny()) / "meta_000650.json").write_text(content)
    assert "meta_000650.json: must " in refused(tmp_path, capsys)


def test_parts_of_a_newer_nanochat_are_named(tmp_path, capsys):
    newer = {
        "resid_lambdas": np.ones(2),
        "value_embeds.1.weight": np.ones((VOCAB, 16)),
        "transformer.h.0.attn.ve_gate.weight": np.ones((2, 12)),
        "transformer.h.1.attn.ve_gate.weight": np.ones((2, 12)),
    }
    write(tmp_path / "source", Tiny(weights=random_weights() | newer))
    line = refused(tmp_path, capsys)
    assert "4 tensors are not known to mlx-lm's nanochat" in line
    assert "('resid_lambdas', 'transformer.h.N.attn.ve_gate.weight', 'value_embeds.N.weight')" in line


def test_a_weight_that_is_not_finite_is_refused(tmp_path, capsys):
    weights = random_weights()
    weights["lm_head.weight"][3, 4] = np.nan
    write(tmp_path / "source", Tiny(weights=weights))
    assert "tensor lm_head.weight is not finite as float32" in refused(tmp_path, capsys)


# --- the file of weights is untrusted ------------------------------------------------------------------


def holding(opcodes: bytes) -> bytes:
    """Return the pickle of a dictionary with the one entry "w"."""
    return b"\x80\x02}" + text("w") + opcodes + b"s."


def read(path: Path, data: bytes, **archive: bytes) -> np.ndarray:
    """Read the tensor "w" from a file whose one storage has the numbers 0 to 5."""
    write_archive(path, data, {"0": np.arange(6, dtype="<f4").tobytes()}, **archive)
    with TorchFile(path) as file:
        return np.array(file.read("w"))


OF_SIX = tensor("0", "FloatStorage", (2, 3))


def test_a_tensor_may_be_a_part_of_its_storage(tmp_path):
    part = tensor(
        "0", "FloatStorage", (1, 2), strides=(99, 1), offset=3, length=6
    )  # a row of one: any stride
    assert read(tmp_path / "model.pt", holding(part)).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (holding(name_of("os", "system") + tuple_of(text("touch ran")) + b"R"), "its pickle asks for 'os.system'"),
        (holding(tensor("0", "LongStorage", (2, 3))), "its pickle asks for 'torch.LongStorage'"),
        (holding(tensor("0", "FloatStorage", (2, 3), strides=(1, 2))), "must lie row by row"),
        (holding(tensor("0", "FloatStorage", (2, 3), offset=1)), "must fit its storage of 6 numbers"),
        (holding(tensor("0", "FloatStorage", (2, -3), length=6)), "got one of another kind"),
        (holding(tensor("1", "FloatStorage", (2, 3))), "data/1' cannot be read"),
        (holding(tensor("0", "HalfStorage", (2, 3))), "data/0' must have 12 bytes, has 24"),
        (holding(tensor("../0", "FloatStorage", (2, 3))), r"data/../0' cannot be read"),
        (holding(b"}"), "'w' is dict .the model's own state is wanted"),
        (holding(integer(3) + b"Q"), "got a storage of another kind"),
        (holding(tensor("0", "FloatStorage", (2, 3), length=-6)), "got a storage of another kind"),
        (
            holding(tuple_of(*map(text, ("storage", "LongStorage", "0", "cpu")), integer(6)) + b"Q"),
            "got a storage of another kind",
        ),
        (holding(OF_SIX)[:-40], "its pickle cannot be read"),
        (holding(tensor("0", "FloatStorage", (1,) * 9, length=6)), "got one of another kind"),
        (holding(OF_SIX + b"r\xff\xff\xff\x7f"), "object number 2147483647 of"),
        (b"\x80\x02" + integer(5) + b".", "got int"),
        (b"\x80\x02}.", "got dict"),
    ],
)  # fmt: skip
def test_a_pickle_of_anything_but_plain_tensors_is_refused(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=words):
        read(tmp_path / "model.pt", data)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_changes_its_stand_ins_does_not_affect_the_next_pickle(tmp_path):
    # Sets the attribute __len__ of the stand-ins for OrderedDict and for torch's function.
    for target in (name_of("collections", "OrderedDict"), name_of("torch._utils", "_rebuild_tensor_v2")):
        changing = target + tuple_of(b"N", b"}" + text("__len__") + integer(3) + b"s") + b"b"
        with pytest.raises(ModelError, match="cannot be read"):
            read(tmp_path / "model.pt", holding(changing))
    assert read(tmp_path / "model.pt", holding(OF_SIX)).shape == (2, 3)


def test_numbers_of_a_big_endian_machine_are_refused(tmp_path):
    with pytest.raises(ModelError, match="little-endian"):
        read(tmp_path / "model.pt", holding(OF_SIX), byteorder=b"big")


def test_a_storage_that_is_larger_than_the_pickle_says_is_not_unpacked(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", holding(OF_SIX))
        archive.writestr("model/data/0", bytes(10_000_000))
    with TorchFile(path) as file, pytest.raises(ModelError, match="must have 24 bytes, has 10000000"):
        file.read("w")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02l\n\x8a\nFF\xf9F"])
def test_a_file_that_is_not_a_zip_of_torch_is_refused(tmp_path, capsys, content):
    (write(tmp_path / "source", Tiny()) / "model_000650.pt").write_bytes(content)
    assert "must be a zip as torch.save writes it" in refused(tmp_path, capsys)


def test_another_zip_is_refused(tmp_path, capsys):
    with zipfile.ZipFile(write(tmp_path / "source", Tiny()) / "model_000650.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    assert "its zip has no data.pkl of its own" in refused(tmp_path, capsys)


def test_a_file_cut_or_changed_after_it_was_written_is_refused(tmp_path, capsys):
    file = write(tmp_path / "source", Tiny()) / "model_000650.pt"
    whole = bytearray(file.read_bytes())
    file.write_bytes(whole[: len(whole) // 2])
    assert "must be a zip" in refused(tmp_path, capsys)
    at = whole.index(random_weights()["lm_head.weight"].tobytes()[:64])
    whole[at] ^= 1
    file.write_bytes(whole)
    assert "cannot be read: Bad CRC-32" in refused(tmp_path, capsys)
