"""The size limit of one run of prompts through a model. Loads no MLX: memory planning uses it too."""

#: Most prompt tokens, padding included, that run through a model at once; a longer prompt runs alone. A GPU is busy with
#: this many, and more would only take more memory: 256 prompts at once took several times that of their cache.
PREFILL_TOKENS = 2048


def prompts_at_once(longest: int) -> int:
    """Return how many prompts of up to `longest` tokens may run at once: a power of two, like the rows on CUDA."""
    return 1 << (max(1, PREFILL_TOKENS // max(1, longest)).bit_length() - 1)
