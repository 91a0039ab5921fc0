"""Everything that crosses a process border: typed messages, their bytes, and the handshake."""
