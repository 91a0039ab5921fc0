"""Kernels go from folder to folder whole."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
from stand_in import CODE, write_kernel

from grpo_actors.kernels.files import compiled_in, copy, kernels_in, link, publish


def test_a_published_kernel_has_all_of_its_files_and_long_names_have_folders(tmp_path):
    origin, target = tmp_path / "origin", tmp_path / "target"
    names = ["Add", "Multiply/Exp/Sum"]
    for name in names:
        write_kernel(origin, name)
    for kept in names:  # each may be the first
        assert publish([kept], origin, target) == [kept]
        shutil.rmtree(target)
    assert sorted(publish(compiled_in(origin), origin, target)) == names
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == [f"{name}{suffix}" for name in names for suffix in (".cu", ".ptx", ".txt")]
    assert publish(compiled_in(origin), origin, target) == []  # it is there


def test_a_kernel_without_a_source_is_not_finished_and_stays(tmp_path):
    write_kernel(tmp_path, "Add")
    (tmp_path / "Half.ptx").write_bytes(CODE[:100])
    (tmp_path / "Empty.ptx").write_bytes(CODE)
    (tmp_path / "Empty.cu").touch()
    assert list(compiled_in(tmp_path)) == ["Add"]


@pytest.mark.parametrize("name", ["Add", "Multiply/Exp/Sum"])
def test_what_was_brought_does_not_count_as_compiled(tmp_path, name):
    cache, one, other = (tmp_path / folder for folder in ("cache", "one", "other"))
    write_kernel(cache, name)
    copy([name], cache, one)
    link([name], cache, other)
    for folder in (one, other):
        assert list(kernels_in(folder)) == [name]
        assert list(compiled_in(folder)) == []
        assert (folder / f"{name}.ptx").read_bytes() == CODE


def test_a_process_that_compiles_a_kernel_again_does_not_change_the_published_one(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "folder"
    write_kernel(cache, "Add")
    copy(["Add"], cache, folder)
    with (folder / "Add.ptx").open("wb"):  # as MLX begins to write
        assert (cache / "Add.ptx").read_bytes() == CODE


def _publish_often(origin: Path, target: Path, count: int) -> None:
    for i in range(count):
        publish(["Add"], origin, target / str(i))


def test_a_reader_sees_whole_kernels_only_while_two_processes_publish_them(tmp_path):
    origin, target, count = tmp_path / "origin", tmp_path / "target", 50
    write_kernel(origin, "Add")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_publish_often, args=(origin, target, count)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = 0
    while seen < count:
        if (code := target / str(seen) / "Add.ptx").exists():
            assert code.read_bytes() == CODE
            assert code.with_suffix(".txt").read_text() == "kernel\t_Z6kernel\n"
            seen += 1
        elif not any(process.is_alive() for process in processes):
            assert (target / str(seen) / "Add.ptx").exists()
    for process in processes:
        process.join()
        assert process.exitcode == 0
