"""The room of `python -m gemma_cot.prepare`: published datasets to checked rows of our schema."""
