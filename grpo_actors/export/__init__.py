"""Take a trained policy out of its run: a model folder, an adapter, a GGUF file, an upload, each with a model card."""
