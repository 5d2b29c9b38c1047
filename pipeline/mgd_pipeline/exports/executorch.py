"""The student as an ExecuTorch program (.pte) for one image of a fixed size; XNNPACK computes it on phones and small boards.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mgd_pipeline.exports.deployed import Run, Size, cannot_run, converting
from mgd_pipeline.exports.torch_export import to_program
from mgd_pipeline.networks.segmentation import REFUSALS
from mgd_pipeline.students.student import Student


def write(student: Student, path: Path, size: Size | None) -> None:
    """Raises WeightsError for a network that ExecuTorch cannot convert."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with converting(student, "ExecuTorch cannot convert it"):
        lowered = to_edge_transform_and_lower(to_program(student, size), partitioner=[XnnpackPartitioner()])
        program = lowered.to_executorch()
    path.write_bytes(program.buffer)


def load(path: Path) -> Run:
    """ExecuTorch on the CPU."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    assert method is not None

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return torch.cat([method.execute([image[None].contiguous()])[0].clone() for image in images_B3HW])
        except REFUSALS as error:
            raise cannot_run("ExecuTorch", images_B3HW, error) from None

    return run
