"""The command line."""

from mgd_stages.cli.main import app, common_options

__all__ = ["app", "common_options"]
