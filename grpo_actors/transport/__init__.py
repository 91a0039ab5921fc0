"""Sockets: the only place that imports zmq. Bytes in, bytes out; no arrays, no messages."""
