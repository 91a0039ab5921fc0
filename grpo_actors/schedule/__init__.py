"""Decide which problem is next, which worker samples it and which group may train.

Pure: no socket, no clock, no model.
"""
