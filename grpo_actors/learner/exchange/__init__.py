"""The exchange: the learner's second thread, with sockets, schedule and records; the first thread only computes."""
