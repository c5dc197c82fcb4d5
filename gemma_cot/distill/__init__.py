"""The room of `python -m gemma_cot.distill`: questions and a teacher to checked rows."""
