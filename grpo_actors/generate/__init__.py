"""Text from a model for whoever asks: one answer as it comes, a chat, a file of prompts. No sockets."""
