"""The student as a LiteRT (TensorFlow Lite) model (.tflite) for one image of a fixed size.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mgd_pipeline.exports.deployed import Run, Size, cannot_run, converting, of_size
from mgd_pipeline.networks.segmentation import REFUSALS
from mgd_pipeline.students.student import Student


def write(student: Student, path: Path, size: Size | None) -> None:
    """Raises WeightsError for a network that LiteRT cannot convert."""
    import litert_torch  # pyright: ignore[reportMissingImports]  (it does not fit every torch)

    assert size is not None
    with converting(student, "LiteRT cannot convert it"):
        network, images = of_size(student, size)
        litert_torch.convert(_Named(network), sample_kwargs={"images": images}).export(str(path))


class _Named(nn.Module):
    """Calls the input `images` and the output `logits`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(images)}


def load(path: Path) -> Run:
    """LiteRT on the CPU, with as many threads as torch has."""
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images_B3HW: Tensor) -> Tensor:
        logits = []
        for image in images_B3HW:
            try:
                interpreter.set_tensor(given["index"], image[None].numpy())
                interpreter.invoke()
            except REFUSALS as error:
                raise cannot_run("LiteRT", images_B3HW, error) from None
            logits.append(torch.from_numpy(interpreter.get_tensor(made["index"])))
        return torch.cat(logits)

    return run
