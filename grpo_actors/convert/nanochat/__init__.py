"""Convert nanochat checkpoints into model folders; the only package that knows nanochat's files.

`nanochat_folder` combines the parts:

    source_files     finds the files of a checkpoint and reads its sizes
    torch_file       reads the weights without torch
    tensor_names     lists the tensors that a model must have
    encoding         reads the pickled tiktoken encoding
    bpe              turns the encoding into a tokenizer.json
    chat_template    special tokens and the chat template
    pickles          loads pickles; they are untrusted, so they may build plain data and nothing else
"""

from grpo_actors.convert.nanochat.nanochat_folder import Conversion, source_model, write_folder

__all__ = ["Conversion", "source_model", "write_folder"]
