"""Does a run fit, and how long does it take: its own functions, compiled for chips not at hand."""
