"""What the supervisor starts and how it holds it. No MLX, no model."""
