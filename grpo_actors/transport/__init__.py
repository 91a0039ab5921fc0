"""Sockets and weight transports. They carry bytes and do not depend on arrays or messages; only this part imports zmq."""
