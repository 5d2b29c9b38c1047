"""SGD with a momentum of its own for the gradients of distillation (DOT: Zhao et al., "DOT: A Distillation-Oriented Trainer",
ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class DistillationSGD(torch.optim.Optimizer):
    """Two momentum buffers v for each parameter w, with the gradients g of the task and of distillation:

        v_task <- (momentum - distillation_momentum) v_task + g_task + weight_decay w
        v_distillation <- (momentum + distillation_momentum) v_distillation + g_distillation
        w <- w - lr (v_task + v_distillation)

    A parameter with one of the two gradients only has plain momentum in that step, as in SGD. With a `distillation_momentum` of 0
    this is `torch.optim.SGD` on the sum of both gradients. Both buffers are in the state dict. A step has two backward passes:

        distillation_loss.backward(retain_graph=True)
        optimizer.step_distillation()
        task_loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    `params` may be groups with values of their own. Raises ValueError for values that are impossible, in a group, too.
    """

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.9, distillation_momentum: float = 0.075, weight_decay: float = 0.0
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "distillation_momentum": distillation_momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self._distillation: dict[Tensor, Tensor] = {}
        """Gradients that `step_distillation` took and `step` has not used yet."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        momentum, more = group["momentum"], group["distillation_momentum"]
        if group["lr"] < 0 or group["weight_decay"] < 0:
            raise ValueError(f"lr {group['lr']} and weight_decay {group['weight_decay']} must not be negative")
        if more < 0 or momentum - more < 0 or momentum + more >= 1:
            raise ValueError(f"momentum {momentum} -+ distillation_momentum {more} must stay within 0 and 1, 1 excluded")

    def step_distillation(self) -> None:
        """Takes the gradients that the parameters have now as those of distillation; the parameters have none afterwards."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._distillation[w] = w.grad + self._distillation[w] if w in self._distillation else w.grad
                    w.grad = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step with the gradients that the parameters have now, those of the task, and those of `step_distillation`."""
        if closure is not None:
            raise ValueError("a step has two backward passes, for which a closure has no place")
        for group in self.param_groups:
            for w in group["params"]:
                distillation = self._distillation.pop(w, None)
                if w.grad is not None or distillation is not None:
                    _move(w, distillation, self.state[w], group)
        return None


def _move(w: Tensor, distillation: Tensor | None, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    both = w.grad is not None and distillation is not None
    more = group["distillation_momentum"] if both else 0.0
    for name, gradient, momentum in (
        ("task_buffer", w.grad, group["momentum"] - more),
        ("distillation_buffer", distillation, group["momentum"] + more),
    ):
        if name not in state:
            state[name] = torch.zeros_like(w, memory_format=torch.preserve_format)
        state[name].mul_(momentum)
        if gradient is not None:
            state[name].add_(gradient)
    if group["weight_decay"]:
        state["task_buffer"].add_(w, alpha=group["weight_decay"])
    w.add_(state["task_buffer"] + state["distillation_buffer"], alpha=-group["lr"])
