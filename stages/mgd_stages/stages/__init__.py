"""One module for each stage, in the order of `dvc repro`; `mgd_stages` exposes them as functions."""
