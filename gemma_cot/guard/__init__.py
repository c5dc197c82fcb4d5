"""What keeps rewards honest: hostile completions, a linter, canaries, a sandbox for model code."""
