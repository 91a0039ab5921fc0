"""A run's records: their schema, the files they are written to, alarms, and the views that a person sees."""
