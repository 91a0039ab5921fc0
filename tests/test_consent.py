"""No code runs on the word of settings that came over the wire or with somebody else's folder."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.candidates import Candidate, settings_of
from grpo_actors.learner.replay import open_replay
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.process import StopRequest
from grpo_actors.rollout.joining import preload_policy
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.shares import Shares
from grpo_actors.supervisor.worker_pool import WorkerPool
from grpo_actors.transport.sockets import CONTROL_BYTES, bind, zmq_context
from grpo_actors.wire.messages import Hello, Welcome, decode, encode, from_peer

ROOT = Path(__file__).parents[1]
#: Leaves a mark wherever Python runs it.
CODE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


def settings(**sections):
    return Config.model_validate({"data": {"task": "arithmetic"}} | sections)


def test_the_code_of_settings_is_what_they_name_and_no_built_in():
    given = settings(
        reward={
            "functions": {"correctness": 1, "own.py:f": 1, "module:f": 1, "code_tests": 1},
            "allow_code_execution": True,
        },
        data={"task": "arithmetic", "environment": "env.py:reply"},
        model={"trust_remote_code": True},
    )
    assert consent.code_of(given) == [
        "own.py:f",
        "module:f",
        "code_tests",
        "env.py:reply",
        "trust_remote_code",
    ]
    assert consent.code_of(settings(data={"environment": "calculator", "task": "arithmetic"})) == []


def test_a_function_of_the_caller_is_named_and_is_no_code_that_runs_here():
    given = settings(
        reward={"functions": {"correctness": 1, "own.py:f": 1, "caller:brevity": 1}},
        data={"task": "arithmetic", "environment": "caller:reply"},
    )
    assert consent.functions_of_caller(given) == ["caller:brevity", "caller:reply"]
    assert consent.code_of(given) == ["own.py:f"]


def test_consent_is_for_exactly_the_names_given_and_the_refusal_says_how_to_give_it():
    code = ["own.py:f", "a b.py:g"]
    with pytest.raises(ConfigError) as caught:
        consent.check(code, ["own.py:g"], "there")
    text = str(caught.value)
    assert text.startswith("there: its settings would run own.py:f, a b.py:g here; ")
    assert shlex.split(text.partition("add ")[2]) == ["--allow", "own.py:f", "--allow", "a b.py:g"]
    consent.check(code, code, "there")


@pytest.fixture
def dangerous(tmp_path):
    """Settings that name every kind of code, all of it in a folder where it would leave a mark."""
    (tmp_path / "own.py").write_text(CODE + "def f(completions): return [0.0] * len(completions)\n")
    (tmp_path / "env.py").write_text(CODE + "def reply(messages): return None\n")
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text(CODE)
    architecture = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(architecture | {"model_file": "code.py"}))
    return settings(
        reward={"functions": {f"{tmp_path}/own.py:f": 1.0, "code_tests": 1.0}, "allow_code_execution": True},
        data={"task": "arithmetic", "environment": f"{tmp_path}/env.py:reply"},
        model={"model_name": f"{tmp_path}/model", "trust_remote_code": True},
    )


def marks(folder):
    return [path.name for path in folder.rglob("*.ran")]


def python(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_folder(path, config):
    (path / "checkpoint-1").mkdir(parents=True)
    (path / "checkpoint-1" / "manifest.json").write_text("{}")
    (path / "config.json").write_text(config.model_dump_json())
    (path / "groups.jsonl").touch()
    return path


def test_a_worker_and_a_learner_run_nothing_of_foreign_settings(dangerous, tmp_path):
    """Whoever answers at the address is the worker's learner here; the learner itself is given a run folder."""
    endpoint, folder = f"ipc://{tmp_path}/c", run_folder(tmp_path / "run", dangerous)
    with ExitStack() as stack:
        worker = stack.enter_context(python("grpo_actors.rollout", "--connect", endpoint, cwd=tmp_path))
        stack.callback(worker.kill)
        learner = stack.enter_context(python("grpo_actors.learner", str(folder), cwd=tmp_path))
        stack.callback(learner.kill)
        answering = bind(stack.enter_context(zmq_context()), zmq.ROUTER, endpoint, CONTROL_BYTES)
        assert answering.poll(int(HANG_S * 1000))
        peer, data = answering.recv_multipart()
        assert isinstance(decode(from_peer, data), Hello)
        welcome = Welcome(
            run_id="r",
            config=dangerous.model_dump_json(),
            identity="{}",
            weights_endpoint=endpoint,
            beat_s=1.0,
        )
        answering.send_multipart([peer, encode(welcome)])
        for process, where in ((worker, endpoint), (learner, folder / "config.json")):
            (line,) = process.stderr.read().splitlines()
            assert process.wait(HANG_S) == 2
            code = consent.code_of(dangerous)
            assert line.startswith(f"error: {where}: its settings would run {', '.join(code)} here; ")
            assert line.endswith("add " + " ".join(f"--allow {name}" for name in code))
    assert marks(tmp_path) == []


def test_no_tool_runs_what_a_run_folder_names(dangerous, tmp_path):
    folder = run_folder(tmp_path / "run", dangerous)
    candidates = [Candidate("run/base", run=folder)]
    allowed = consent.code_of(dangerous)
    with pytest.raises(ConfigError, match=r"own\.py:f, code_tests, .*env\.py:reply, trust_remote_code here"):
        settings_of(candidates, None, [])
    # Naming it in --set, or the whole file with --config, is consent too.
    by_hand = f"reward.functions={{'{tmp_path}/own.py:f'=1.0}}"
    with pytest.raises(ConfigError, match=r"would run .*env\.py:reply, trust_remote_code here"):
        settings_of(candidates, None, [by_hand])
    assert settings_of(candidates, None, [], allowed=allowed) == dangerous
    assert settings_of(candidates, str(folder / "config.json"), []) == dangerous
    # To load a model, or to train on recorded groups, only the model's code runs.
    loads = "would run trust_remote_code here; if you trust them, add --allow trust_remote_code"
    with pytest.raises(ConfigError, match=loads):
        settings_of(candidates, None, [], only_loads=True)
    with (
        pytest.raises(ConfigError, match=loads),
        open_replay(tmp_path / "new", folder, None, [], StopRequest()),
    ):
        pass
    assert preload_policy(folder / "config.json", lambda *_: None) is None
    assert marks(tmp_path) == []


def test_a_pool_of_workers_has_the_consent_of_its_user(dangerous, tmp_path):
    allow = consent.options_for(dangerous)
    assert allow == [word for name in consent.code_of(dangerous) for word in ("--allow", name)]
    shares = Shares(dangerous, allocate(dangerous, Machine("cpu", 2, 2**34)))
    (worker,) = WorkerPool(tmp_path, dangerous, shares, "ipc://x").workers
    assert worker.command[-len(allow) :] == allow
