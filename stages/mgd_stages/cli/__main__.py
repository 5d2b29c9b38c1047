"""`python -m mgd_stages.cli`, which torchrun starts."""

from mgd_stages.cli import app

app()
