"""`mgd-pipeline run`: all stages of a project in one process, those alone that are not up to date."""
