"""TOOL: writes the files of a new task, for the user to change."""
