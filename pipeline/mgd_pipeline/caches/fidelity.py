"""What a student feels of the encoding of a teacher cache, and what it saves, from notes that stage one keeps in the commit."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mgd_pipeline.caches.encoding import Fidelity
from mgd_pipeline.caches.reader import TargetCache


class Kept(NamedTuple):
    """None of an array that is not encoded."""

    kl: float | None
    """KL divergence from the teacher's probabilities to the stored ones, nats, mean over cells"""
    same_class: float | None
    """Share of the cells with the same most likely class"""
    cosine: float | None
    """RMS error of the cosine similarity of two cells of the regions"""
    size: float
    """Bytes of the shards, as a share of those with uint8 logits and float16 embeddings, not compressed"""

    def __str__(self) -> str:
        parts = []
        if self.kl is not None and self.same_class is not None:
            parts.append(f"KL {self.kl:.2g} nats, same class in {100 * self.same_class:.2f} % of the cells")
        if self.cosine is not None:
            parts.append(f"cosines of regions off by {self.cosine:.2g} (RMS)")
        return "; ".join([*parts, f"{100 * self.size:.1f} % of the bytes of uint8 logits and float16 embeddings"])


def what_is_kept(cache: TargetCache) -> Kept | None:
    """Over a sample of the cells of all images; None for a cache that is neither encoded nor compressed, or has no targets."""
    layout, notes = cache.layout, [shard["fidelity"] for shard in cache.commit["shards"] if "fidelity" in shard]
    records = cache.index.stored(layout.rows_per_shard).tolist()
    if not sum(records) or (not notes and layout.compression == "none"):
        return None
    sums = Fidelity(*(sum(note[field] for note in notes) for field in Fidelity._fields))
    plain = replace(layout, encoding="uint8", region_encoding="float16", compression="none")
    full = sum(plain.shard_sizes(name, count)[0] for name in plain.records for count in records)
    stored = sum(entry["size"] for name, entry in cache.commit["files"].items() if "/c/" in name)
    return Kept(
        sums.kl / sums.cells if sums.cells else None,
        sums.same_class / sums.cells if sums.cells else None,
        float(np.sqrt(sums.cosine / sums.pairs)) if sums.pairs else None,
        stored / full,
    )
