"""TOOL: lists the runs below a folder."""
