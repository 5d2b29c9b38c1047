"""How fast a training is, and how long it waits for data."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator

import torch

from mgd_pipeline.training.batches import Batch
from mgd_stages.run.progress import console

_WAITING_SHARE = 0.1


class Pace:
    """Times the steps of a training. The first step does not count: it includes everything that starts then."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.images, self.device = images, device
        self.steps, self.waited, self.began = -1, 0.0, time.monotonic()
        self.last = (self.steps, self.waited, self.began)

    def wait(self, batches: Iterator[Batch]) -> Batch | None:
        before = time.monotonic()
        batch = next(batches, None)
        self.waited += time.monotonic() - before
        return batch

    def step(self) -> None:
        self.steps += 1
        if self.steps == 0:
            self.waited, self.began = 0.0, time.monotonic()
            self.last = (0, 0.0, self.began)

    def since_last_look(self) -> str:
        steps, waited, began = self.last
        self.last = (self.steps, self.waited, time.monotonic())
        if self.steps <= steps:
            return f"{self.memory() / 1e9:.1f} GB"
        seconds = max(self.last[2] - began, 1e-9)
        share = (self.waited - waited) / seconds
        each = seconds / (self.steps - steps)
        speed = f"{1000 * each:.0f} ms a step, {self.images / each:.1f} images/s"
        return f"{speed}, {share:.0%} waiting for data, {self.memory() / 1e9:.1f} GB"

    def memory(self) -> int:
        """Peak bytes of the GPU, or of this process without a GPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # macOS counts bytes, Linux kilobytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @property
    def waiting_share(self) -> float:
        return self.waited / max(time.monotonic() - self.began, 1e-9) if self.steps > 0 else 0.0

    def report(self) -> dict[str, float | str | None]:
        seconds = (time.monotonic() - self.began) / self.steps if self.steps > 0 else None
        return {
            "device": str(self.device),
            "seconds_per_step": seconds and round(seconds, 6),
            "images_per_second": seconds and round(self.images / seconds, 2),
            "waiting_for_data": round(self.waiting_share, 4),
            "peak_memory_mb": round(self.memory() / 1e6),
        }

    def warn(self, title: str, num_workers: int) -> None:
        if self.waiting_share > _WAITING_SHARE:
            console.print(
                f"{title}: {self.waiting_share:.0%} of the time went into waiting for data; raise --num-workers (it was "
                f"{num_workers}, this machine has {os.cpu_count()} cores)"
            )
