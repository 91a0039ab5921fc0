"""Generate text for a user: a streamed answer, a chat, or a file of prompts. No sockets."""
