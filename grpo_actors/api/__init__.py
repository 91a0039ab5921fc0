"""Train, and use what was trained, from Python or a notebook.

    from grpo_actors.api import train

    run = train(model="Qwen/Qwen2.5-0.5B-Instruct", data=rows, rewards=[my_reward], max_updates=100)
    run.wait()

`train` starts the same run as ``grpo train``, in processes of its own. Importing this module loads no model library.
"""

from grpo_actors.api.run import Run
from grpo_actors.api.training import train

__all__ = ["Run", "train"]
