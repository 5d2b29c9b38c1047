"""The student file: reading it, running it, exporting it."""
