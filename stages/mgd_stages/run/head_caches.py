"""Whether the caches of heads belong to the embeddings that are here. Students ask, so no code of teachers is reached."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.errors import CacheError, ProvenanceMismatch, shell_command
from mgd_stages.run.project import Project


def refuse_stale_heads(project: Project, caches: Mapping[str, TargetCache]) -> None:
    """Raises ProvenanceMismatch for the cache of a head that was made from other embeddings than its teacher's cache has now.

    A student needs no embeddings of a teacher that it does not listen to: a cache of embeddings that is not here is not compared.
    """
    for name in project.params.heads.keys() & caches.keys():
        of, cache, base = project.params.heads[name], caches[name], None
        with suppress(CacheError):
            base = open_cache(project.targets(of))
        made_from = cache.provenance["teacher"].get("embeddings")
        if base is not None and base.fingerprint != made_from:
            stages = "train-teacher", "precompute-teachers"
            commands = [shell_command("mgd-pipeline", stage, "--teacher", name) for stage in stages]
            raise ProvenanceMismatch(
                f"{cache.path}: was made from other embeddings of {of} ({str(made_from)[:12]}...) than {base.path} has now "
                f"({base.fingerprint[:12]}...); run `{commands[0]}`, then `{commands[1]}`"
            )
