"""Which problem next, who samples it, what may train: pure. No socket, no clock, no model."""
