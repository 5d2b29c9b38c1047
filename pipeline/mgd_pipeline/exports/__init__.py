"""Students for other runtimes: one module for each."""
