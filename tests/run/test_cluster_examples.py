"""The files of examples/cluster: well-formed, and the one for ssh run with a stand-in that logs in to this host."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bounds import HANG_S
from runs import Run, wait_until

from grpo_actors.rollout.__main__ import parser
from grpo_actors.transport.sockets import Endpoints, plan_endpoints

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
MANIFEST = FOLDER / "kubernetes.yaml"


def containers():
    """The containers of all jobs of the manifest."""
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job", "Job"]
    specs = [document["spec"]["template"]["spec"] for document in documents[1:]]
    for spec in specs:
        names = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]} <= names
    return {each["name"]: each for spec in specs for each in spec["containers"]}


def test_the_manifest_starts_the_ordinary_commands():
    learner, workers = (containers()[name]["args"][0] for name in ("learner", "workers"))
    for script in (learner, workers):
        subprocess.run(["sh", "-n", "-c", script], check=True)
    assert "exec grpo train prod" in learner
    (command,) = [line for line in workers.splitlines() if "grpo worker" in line]
    given = parser().parse_args(command.replace("$device", "3").split()[2:-1])
    assert (given.connect, given.key, given.device) == (
        "tcp://grpo-learner:7000",
        Path("/tmp/worker.key"),  # noqa: S108 - in the container
        3,
    )
    devices = workers.split("for device in ")[1].split(";")[0].split()
    assert len(devices) == containers()["workers"]["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_well_formed(script):
    assert len(SCRIPTS) == 2
    subprocess.run(["sh", "-n", str(script)], check=True)
    if (
        checker := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ) is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([checker, str(script)], check=True)


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_over_ssh_each_host_has_its_workers_and_no_key_is_left(make_run, tmp_path):
    run: Run = make_run(max_updates=100_000, workers=1, eval_every_updates=0)
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    program(programs / "grpo", f'exec {sys.executable} -m grpo_actors "$@"')
    program(programs / "ssh", 'shift; cd "$HOME"; exec sh -c "$*"')
    port = plan_endpoints(tmp_path, "tcp", "127.0.0.1", 0).control.rpartition(":")[2]
    environment = {
        **run.environment,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "ADDRESS": "127.0.0.1",
        "LISTEN": "127.0.0.1",
        "PORT": port,
    }
    command = [str(FOLDER / "ssh.sh"), "one:1 two:1", *run.launch_arguments()]
    output = (tmp_path / "output").open("wb+")
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, process_group=0)
    try:

        def attached():
            return {r["worker"] for r in run.records("worker") if "attached" in r["worker"] and r["groups"]}

        wait_until(lambda: len(attached()) == 2, "a worker of each host delivers groups")
        os.kill(Endpoints.read(run.folder).pid, signal.SIGTERM)
        assert process.wait(HANG_S) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        print(output.read().decode())
        output.close()
    listed = subprocess.run(
        ["grpo", "keys", "list"], env=environment, capture_output=True, text=True, check=True
    )
    assert "worker" not in listed.stdout
    assert list(home.glob(".grpo-*.key")) == []
