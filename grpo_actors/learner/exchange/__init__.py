"""The learner's second thread: sockets, schedule and records, so that the first one only computes."""
