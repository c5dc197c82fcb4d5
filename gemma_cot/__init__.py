"""GRPO for Gemma 3 in pure JAX."""
