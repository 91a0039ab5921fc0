"""What the wheel gives in an empty environment and an empty folder: the command, the settings, a first task."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from bounds import HANG_S
from terminals import Terminal

ROOT = Path(__file__).parents[1]
#: All that the wheel is built of.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "grpo_actors", "configs")


def ran(command, folder, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment or {key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of programs of a new environment: the wheel, and the dependencies of the present one."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    clone.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        more = (
            {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")}
            if copy is not shutil.copy
            else {}
        )
        copy(ROOT / name, clone / name, **more)
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('..'))"
    wheel = ran([sys.executable, "-c", build], clone).splitlines()[-1]
    shutil.rmtree(clone)
    environment = folder / "environment"
    has_pip = importlib.util.find_spec("pip") is not None  # it has not if uv made the present environment
    venv.create(environment, with_pip=not has_pip)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python] if has_pip else [python, "-m", "pip"]
    ran([*pip, "install", "--quiet", "--no-deps", "--no-index", folder / wheel], folder)
    # Behind the new environment's own packages; an editable installation in there does not come along.
    [packages] = environment.glob("lib/python*/site-packages")
    present = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "present.pth").write_text("".join(f"{entry}\n" for entry in present))
    return environment / "bin"


def test_the_wheel_has_the_command_and_the_shipped_settings(installed, tmp_path):
    grpo = installed / "grpo"
    for name in ("quickstart", "prod"):
        assert "# memory: " in ran([grpo, "train", name, "--set", "model_name=tiny", "--dry-run"], tmp_path)
    where = ran([installed / "python", "-c", "import grpo_actors; print(grpo_actors.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_init_are_settings_that_load_and_its_hints_work_in_a_bare_shell(installed, tmp_path):
    printed = ran([installed / "grpo", "init", "sums"], tmp_path)
    assert sorted(path.name for path in (tmp_path / "sums").iterdir()) == [
        *("grpo.toml", "problems.jsonl", "rewards.py"),
    ]
    [_, train] = [line for line in printed.splitlines() if line.startswith("  ")]
    shown = ran(["sh", "-c", f"{train} --dry-run"], tmp_path, PATH="/usr/bin:/bin")
    assert "# reward: rewards.py:shows_its_work, weight 0.5" in shown


@pytest.mark.slow
def test_a_first_task_is_tried_trained_shown_and_talked_to(installed, tmp_path):
    grpo = installed / "grpo"
    ran([grpo, "init"], tmp_path)
    assert ran([grpo, "trial"], tmp_path).endswith("ready\n")
    ran([grpo, "train", "--set", "max_updates=4", "--set", "eval_every_updates=2"], tmp_path)
    assert "my-task  done, update 4 of 4" in ran([grpo, "runs"], tmp_path)
    run = Path("outputs") / "my-task"
    (tmp_path / run / "report.html").unlink()  # that the run has written at its end
    ran([grpo, "report", run], tmp_path)
    page = (tmp_path / run / "report.html").read_text()
    assert "my-task" in page
    assert str(tmp_path) not in page
    with Terminal([grpo, "chat", run], environment={"PYTHONPATH": ""}, folder=tmp_path) as terminal:
        assert "/help lists the commands" in terminal.read_until("\n> ")
        assert terminal.ask("What is 3 + 4?")
        terminal.type("\x04")
        assert terminal.process.wait(HANG_S) == 0
