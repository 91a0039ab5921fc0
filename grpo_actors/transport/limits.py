"""The most that peers together can make the learner keep in memory for them."""

#: Largest message in bytes, over all its frames. It holds one group, for which 64 MiB is far more than enough.
MAX_MESSAGE_BYTES = 64 * 2**20
#: Bytes of all peers' unfinished messages together.
MAX_TOTAL_BYTES = 256 * 2**20
#: Connections at one socket.
MAX_CONNECTIONS = 256
