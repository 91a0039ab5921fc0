"""Train, and use what was trained, from Python or a notebook.

    from grpo_actors.api import evaluate, generate, load, train

    run = train(model="Qwen/Qwen2.5-0.5B-Instruct", data=rows, rewards=[my_reward], max_updates=100)
    run.wait()
    print(run.best, run.score)
    print(generate(run, "What is 17 + 25?"))

`train` starts the same run as ``grpo train``, in processes of its own. `load`, `generate` and `evaluate` work in this
process, as ``grpo generate`` and ``grpo eval`` do. Importing this module loads no model library.
"""

from grpo_actors.api.evaluation import evaluate
from grpo_actors.api.models import Model, Sampling, generate, load
from grpo_actors.api.run import Run
from grpo_actors.api.training import train

__all__ = ["Model", "Run", "Sampling", "evaluate", "generate", "load", "train"]
