"""The student's file: reading it, running it, exporting it."""
