"""The command that makes, lists and revokes keys for peers on other hosts."""
