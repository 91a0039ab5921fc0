"""Write checkpoints of changing weights until killed or failing: a child process of the fault tests.

    python writing.py RUN_DIR [MAX_FILE_BYTES]

All weights of checkpoint-N equal N, so that a reader can distinguish a whole checkpoint from a mixture.
"""

import resource
import sys
from pathlib import Path

from grpo_actors.config import LearnerConfig, ModelConfig
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training
from grpo_actors.process import run_command
from grpo_actors.rundir.checkpoint_weights import write_checkpoint
from grpo_actors.rundir.checkpoints import prune


def never_called(*_):
    raise AssertionError("nothing trains here")


def main() -> int:
    run_dir = Path(sys.argv[1])
    policy = load_policy(ModelConfig(dtype="float32"), seed=0)
    training = Training(policy.model, LearnerConfig(), never_called)
    first = 1 + max(
        (int(p.name.split("-")[1]) for p in run_dir.glob("checkpoint-*") if p.suffix == ""), default=0
    )
    if len(sys.argv) > 2:
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    print("ready", flush=True)
    for update in range(first, 1_000_000):
        policy.load_trainable({name: 0 * w + update for name, w in policy.trainable().items()})
        training.load_state(training.state())
        write_checkpoint(run_dir, update, policy, training, {"value": update})
        prune(run_dir, 2, frozenset())
    return 0


if __name__ == "__main__":
    run_command(main)
