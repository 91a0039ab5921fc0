"""Prompts in, tokens out: the sampler (`batching`) gives completions a place, and `step` decodes one token of each.

`sampling`, one folder up, is how others ask for it.
"""
