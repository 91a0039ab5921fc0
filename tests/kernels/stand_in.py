"""In place of `grpo_actors.kernels.part`: writes kernels as MLX does, without MLX. ``python stand_in.py NAME SETTINGS``.

With an environment variable PIDS, every part writes its process id into that folder and runs until it is killed.
"""

import os
import sys
from pathlib import Path

CODE = b"c" * 200_000


def write_kernel(folder: Path, name: str) -> None:
    """Write in place and in MLX's order; a long name has folders."""
    for suffix, content in ((".ptx", CODE), (".txt", b"kernel\t_Z6kernel\n"), (".cu", b"source")):
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main() -> None:
    folder, part = Path(os.environ["MLX_PTX_CACHE_DIR"]), sys.argv[1]
    if "PIDS" in os.environ:
        (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
        sys.stdin.read()
    if part == "loss":
        assert (folder / "Known.ptx").read_bytes() == CODE  # from an earlier run
        write_kernel(folder, "Add")
    if part == "body":
        while not (folder / "Add.ptx").exists():  # the stage brings it
            os.sched_yield()
        assert (folder / "Add.ptx").read_bytes() == CODE
        assert (folder / "Add.txt").read_text()
        write_kernel(folder, "Multiply/Exp")
    if part == "head":
        (folder / "Half.ptx").write_bytes(CODE[:100])
        print("Traceback (most recent call last): …")
        sys.exit("ModelError: too exotic")


if __name__ == "__main__":
    main()
