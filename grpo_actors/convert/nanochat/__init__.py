"""nanochat checkpoints as model folders: the one place that knows nanochat's files.

`source` finds the files, `torch_file` reads the weights without torch, `architecture` says which there must
be, `encoding` reads the pickled tiktoken encoding, `tokenizer` and `chat` make of it what mlx-lm and
transformers read. Pickles come from strangers: `pickles` lets them build plain data and nothing else.
"""

from grpo_actors.convert.nanochat.nanochat_folder import Conversion, source_model, write_folder

__all__ = ["Conversion", "source_model", "write_folder"]
