"""The student file: reading it, running it."""
