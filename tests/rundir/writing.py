"""Write checkpoints in the background, while the weights change, until killed or failing: a child of the fault tests.

    python writing.py RUN_DIR [MAX_FILE_BYTES]
    python writing.py again      # for each run folder, a line of standard input, a fork that says its process id and writes

All weights of checkpoint-N equal N, so that a reader can distinguish a whole checkpoint from a mixture.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path

from grpo_actors.config import LearnerConfig, ModelConfig
from grpo_actors.learner.checkpointing import CheckpointWriter
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training
from grpo_actors.process import run_command
from grpo_actors.rundir.checkpoint_weights import freeze_checkpoint
from grpo_actors.rundir.checkpoints import prune


def never_called(*_):
    raise AssertionError("nothing trains here")


def main() -> int:
    if sys.argv[1:] == ["again"]:
        return write_in_forks()
    run_dir = Path(sys.argv[1])
    if len(sys.argv) > 2:
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return write(run_dir, "ready")


def write_in_forks() -> int:
    """All packages are loaded, and nothing is computed yet: a fork is a new process that starts at once."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(write(Path(line.rstrip("\n")), str(os.getpid())))
        os.waitpid(pid, 0)
        print("ended", flush=True)
    return 0


def write(run_dir: Path, greeting: str) -> int:
    policy = load_policy(ModelConfig(dtype="float32"), seed=0)
    training = Training(policy.model, LearnerConfig(), never_called)
    first = 1 + max(
        (int(p.name.split("-")[1]) for p in run_dir.glob("checkpoint-*") if p.suffix == ""), default=0
    )
    state = {"run_id": "r", "cursor": {"position": 0, "set_aside": []}, "skipped_steps": 0}
    print(greeting, flush=True)
    with contextlib.closing(CheckpointWriter(run_dir)) as writer:
        for update in range(first, 1_000_000):
            become(policy, update)
            training.load_state(training.state())
            written = writer.start(freeze_checkpoint(update, policy, training, state | {"records": update}))
            while not written.done():
                become(policy, -1)
            written.result()
            prune(run_dir, 2, frozenset())
    return 0


def become(policy, value):
    policy.load_trainable({name: 0 * w + value for name, w in policy.trainable().items()})


if __name__ == "__main__":
    run_command(main)
