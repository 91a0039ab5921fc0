"""The door of a supervised process: ``python -m grpo_actors.supervisor.entry MODULE ARGUMENTS…``, then as ``python -m MODULE``.

An actor imports for seconds. Should the supervisor die meanwhile, nothing would tell the actor: so the
door follows the parent before it opens.
"""

import runpy
import sys

from grpo_actors.process import follow_parent

if __name__ == "__main__":
    follow_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
