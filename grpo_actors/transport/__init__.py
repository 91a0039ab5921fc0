"""Sockets: the only place with ZeroMQ. Bytes in, bytes out; no arrays."""
