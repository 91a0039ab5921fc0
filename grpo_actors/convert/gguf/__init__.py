"""GGUF files as model folders: what is in the file, and what each part is called elsewhere.

`reader` knows the container, `blocks` its number formats, `families` which tensor of which
architecture goes where, `weights` writes safetensors, `tokenizer` rebuilds tokenizer.json. Each
refuses what it does not know by name: a tensor left out, or a tokenizer that is nearly right, gives
a model that talks and is wrong.
"""

from grpo_actors.convert.gguf.conversion import Conversion, source_model, write_folder

__all__ = ["Conversion", "source_model", "write_folder"]
