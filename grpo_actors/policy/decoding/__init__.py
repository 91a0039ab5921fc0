"""Prompts in, tokens out: `batching` gives completions a place, `step` decodes one token of each, in a `window` or in `slots`.

`sampling`, one folder up, is how others ask for it.
"""
