"""The report: one page of HTML from a project's results."""
