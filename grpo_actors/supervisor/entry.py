"""Start a supervised process: ``python -m grpo_actors.supervisor.entry MODULE ARGUMENTS…`` runs ``python -m MODULE ARGUMENTS…``.

An actor imports for seconds. It must end if the supervisor dies in that time, and say where it hangs, so this module
prepares both first and imports the actor then.
"""

import runpy
import sys

from grpo_actors.process import follow_parent, print_stacks_when_asked

if __name__ == "__main__":
    follow_parent()
    print_stacks_when_asked()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
