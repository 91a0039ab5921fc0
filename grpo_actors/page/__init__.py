"""The page: a run's records as curves, a timeline and samples, in a browser; live from a server, or as one file.

    records ─ curves, timeline, settings ─┐
    groups ── samples ────────────────────┼─ views ─ figures ─ document ─┬─ server   grpo watch --web
    tokenizer ─ pieces ───────────────────┘                              └─ one file grpo report

It only reads: the run folder's files, and the events socket as a reader. No actor imports it, and of the supervisor only what starts
the report of a run that ends.
"""
