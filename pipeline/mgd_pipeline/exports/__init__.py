"""The student for other runtimes: one module for each, and the table of formats."""
