"""The command line: thin commands over the stages. Importing a module adds its commands to the program."""

from mgd_stages.cli import projects, stages, tools, caches  # isort: skip - --help lists them in this order
from mgd_stages.cli.common import app, common_options

__all__ = ["app", "caches", "common_options", "projects", "stages", "tools"]
