"""Decoding: prompts in, tokens out. The sampler (`batching`) assigns completions to rows, `step` decodes a token of each.

`sampling` is the interface for the other parts of the package.
"""
