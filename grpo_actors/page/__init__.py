"""The page: a run's records as curves, a timeline and samples, in a browser; live from a server, or as one file.

    records ─ curves, timeline, settings ─┐
    groups ── samples ────────────────────┼─ views ─ figures ─ document ─┬─ server   python -m grpo_actors.page
    tokenizer ─ pieces ───────────────────┘                              └─ one file python -m grpo_actors.report

It only reads: the run folder's files, and the events socket as a reader. No actor and no supervisor imports it.
"""
