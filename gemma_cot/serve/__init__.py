"""The room of `python -m gemma_cot.serve`: an OpenAI-compatible server for our models."""
