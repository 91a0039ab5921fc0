import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import errno
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from convert_tool import refusal, run
from gguf_files import Tiny, write

from grpo_actors.convert import __main__ as convert
from grpo_actors.errors import ModelError


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.gguf"
    write(path, Tiny())
    return path


def test_the_tool_makes_a_folder_and_samples_an_answer(tiny_file, tmp_path, capsys):
    target = tmp_path / "new" / "model"
    assert run("--gguf", tiny_file, "--output-dir", target, "--dtype", "bfloat16", "--sample-tokens", 3) == 0
    files = {path.name for path in target.iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    printed = capsys.readouterr().out
    # Two layers of 557,056 weights and 512 of norms, 288 × 256 of embedding, the last norm of 256.
    assert "1,189,120 parameters, 2.4 MB, bfloat16" in printed
    assert "tokens/s" in printed
    assert not target.with_name("model.tmp").exists()


def test_a_folder_from_gguf_has_the_same_log_probs_and_a_quantised_one_nearly_the_same(
    tiny_file, tmp_path, capsys
):
    quick = ("--gguf", tiny_file, "--sample-tokens", 0, "--output-dir")
    assert run(*quick, tmp_path / "whole") == 0
    assert "mean |Δ log-prob| 0 nats" in capsys.readouterr().out
    assert run(*quick, tmp_path / "packed", "-q", "--bits", 8) == 0
    difference = float(capsys.readouterr().out.split("|Δ log-prob| ")[1].split()[0])
    # Random weights give near-certain choices; quantisation steps of 1/256 move them by some tenths of a nat.
    assert 0 < difference < 1
    assert not (tmp_path / "packed" / "whole").exists()
    assert ".scales" in str(mx.load(str(tmp_path / "packed" / "model.safetensors")).keys())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "the file is empty"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00", "version must be 2 or 3"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "ends inside its header"),
    ],
)
def test_a_bad_source_ends_in_one_line_and_no_folder(tmp_path, capsys, content, words):
    source = tmp_path / "source.gguf"
    if content is not None:
        source.write_bytes(content)
    assert words in refusal(capsys, "--gguf", source, "--output-dir", tmp_path / "model")
    assert not list(tmp_path.glob("model*"))


def test_a_folder_given_as_source_is_refused(tmp_path, capsys):
    assert "Is a directory" in refusal(capsys, "--gguf", tmp_path, "--output-dir", tmp_path / "model")


def test_an_occupied_folder_is_kept_unless_overwrite_is_given(tiny_file, tmp_path, capsys):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    arguments = ("--gguf", tiny_file, "--output-dir", target, "--sample-tokens", 0)
    assert "add --overwrite" in refusal(capsys, *arguments)
    assert (target / "config.json").read_text() == "old"
    assert run(*arguments, "--overwrite") == 0
    assert (target / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwrite_never_deletes_what_is_no_model(tiny_file, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    line = refusal(capsys, "--gguf", tiny_file, "--output-dir", tmp_path, "--overwrite")
    assert "replaces model folders only" in line
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path, capsys):
    write(tmp_path / "tiny.gguf", Tiny(drop=("blk.1.attn_k.weight",)))
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    line = refusal(capsys, "--gguf", tmp_path / "tiny.gguf", "--output-dir", target, "--overwrite")
    assert "tensor blk.1.attn_k.weight is missing" in line
    assert (target / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]


def test_an_empty_folder_is_filled(tiny_file, tmp_path):
    (tmp_path / "model").mkdir()
    assert run("--gguf", tiny_file, "--output-dir", tmp_path / "model", "--sample-tokens", 0) == 0
    assert (tmp_path / "model" / "config.json").exists()


def test_a_draft_left_behind_is_named(tiny_file, tmp_path, capsys):
    (tmp_path / "model.tmp").mkdir()
    assert "delete it if none is running" in refusal(
        capsys, "--gguf", tiny_file, "--output-dir", tmp_path / "model"
    )


def test_a_file_as_target_is_refused(tiny_file, capsys):
    assert "must be a folder, got a file" in refusal(capsys, "--gguf", tiny_file, "--output-dir", tiny_file)
    assert "cannot be made" in refusal(capsys, "--gguf", tiny_file, "--output-dir", tiny_file / "model")


@pytest.mark.parametrize("reason", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_draft_is_removed_if_the_work_fails_or_is_interrupted(tmp_path, reason):
    def work() -> None:
        with convert.new_folder(
            tmp_path / "model", overwrite=False, option="--output-dir", precious=()
        ) as draft:
            (draft / "half").write_text("written")
            raise reason

    with pytest.raises((ModelError, KeyboardInterrupt)):
        work()
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_that_takes_seconds():
    code = (
        "import sys, grpo_actors.convert.__main__ as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: print(sorted({'mlx', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
