"""Conversion of GGUF files to model folders and back.

`reader` reads the container and `number_formats` decodes its weights. `families` maps the tensors of each
architecture to their names in a model folder, `shards` writes safetensors, and `tokenizer_json` rebuilds
tokenizer.json. `writer` and `tokens` write a GGUF file. Each module rejects unknown content and names it: a
missing tensor, or a tokenizer that is nearly right, gives a model that produces fluent but wrong text.
"""

from grpo_actors.convert.gguf.conversion import Conversion, source_model, write_folder

__all__ = ["Conversion", "source_model", "write_folder"]
