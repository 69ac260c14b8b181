"""One optimizer step: accumulate the gradient of the global batch, clip it, guard it, update.

The loss is the mean over all target tokens of the step, however they are divided into micro-batches and processes: they
are counted first, and each micro-batch adds its sum over that count. Gradients are summed over the processes once,
with the last micro-batch (replicas.py). On a GPU nothing here waits for the
device, except where an optimizer cannot skip a step by itself or where the loss is scaled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fat5.data import PackedBatch
from fat5.errors import ConfigurationError
from fat5.model.activations import checkpoint_activations
from fat5.optim import build_optimizer, skips_on_device
from fat5.train.config import RunConfig
from fat5.train.cuda_graph import GraphedBackward
from fat5.train.precision import LEAST_LOSS_SCALE, Precision
from fat5.train.replicas import Replicas
from fat5.train.world import World


@dataclass
class StepResult:
    """Numbers of a step, on the device until they are asked for."""

    numbers: Tensor
    """float32: loss, gradient norm, and the loss of each micro-batch"""
    loss_scale: float | None
    ready: torch.cuda.Event | None = None

    def read(self) -> tuple[float, float, list[float]]:
        """(loss, gradient norm, losses of the micro-batches); waits for the device if it must."""
        if self.ready is not None:
            self.ready.synchronize()
        loss, norm, *parts = self.numbers.tolist()
        return loss, norm, parts


class StepRunner:
    """The model on its device, in training mode, compiled if asked for; its optimizer, and the steps.

    Args:
        config: its precision is resolved.
        model: moved to the world's device, its weights to the precision's dtype; its parameters get the gradients.
        world: the processes that share a step.
        objective: the module that a step runs, from the model.
    """

    def __init__(
        self, config: RunConfig, model: Any, world: World, objective: Callable[[Any], Any] = lambda model: model
    ) -> None:
        self.world, self.device, self.gradient_clip = world, world.device, config.gradient_clip
        self.precision = Precision(config.precision, self.device)
        model.to(device=self.device, dtype=self.precision.weight_dtype).train()
        checkpoint_activations(model, config.checkpointing)
        on_gpu = self.device.type == "cuda"
        compiled = config.compile is True or (config.compile == "auto" and on_gpu)
        self.forward = objective(model)
        if compiled:
            # Without `deterministic` the compiler times several forms of a reduction and keeps the fastest: another run
            # may keep another, which rounds otherwise.
            self.forward = torch.compile(self.forward, fullgraph=True, dynamic=False, options={"deterministic": True})
        self.optimizer = build_optimizer(config.optimizer, model)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        # If the optimizer can, it skips on the device, and the host reads the numbers a step later.
        self.deferred = on_gpu and skips_on_device(self.optimizer) and self.precision.scaler is None
        self._backward: Callable[[PackedBatch, Tensor], Tensor] = self._forward_backward
        recorded = False
        possible = compiled and on_gpu and self.precision.scaler is None
        if possible and config.cuda_graphs:
            self._backward = GraphedBackward(self._forward_backward, self.weights, self.device)
            recorded = True
        elif config.cuda_graphs is True:
            how = "compiled" if compiled else "not compiled"
            raise ConfigurationError(
                f"cuda_graphs is true, the model is {how} and runs in {config.precision} on {self.device.type}",
                hint="CUDA graphs need a GPU and a compiled model, and do not work with fp16: say auto",
            )
        self.replicas = Replicas(model, self.weights, world, overlap=not recorded)

    def run(self, batches: Sequence[PackedBatch], rate: float) -> StepResult:
        """Makes a step at `rate` times the peak learning rate.

        A loss or gradient that is not finite leaves weights and optimizer untouched.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        count = torch.full((), float(sum(batch.num_items for batch in batches)), device=self.device)
        self.world.all_sum(count)
        losses = [self._backward(batch, count) for batch in batches[:-1]]
        with self.replicas.summing():
            losses.append(self._backward(batches[-1], count))
        scaler = self.precision.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        norm = get_total_norm(gradients)
        loss = self.world.all_sum(torch.stack(losses).sum())
        if self.gradient_clip is not None:
            clip_grads_with_norm_(self.weights, self.gradient_clip, norm)
        self._update(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return self._result(torch.stack([loss, norm, *losses]).detach().float())

    def broken(self, loss: float, norm: float, loss_scale: float | None) -> bool:
        """True if these numbers of a step call for the guard; under fp16 an infinite gradient only lowers the scale."""
        finite_loss, finite_norm = abs(loss) < float("inf"), abs(norm) < float("inf")
        if loss_scale is not None and finite_loss:
            return not finite_norm and loss_scale < LEAST_LOSS_SCALE
        return not (finite_loss and finite_norm)

    def _forward_backward(self, batch: PackedBatch, count: Tensor) -> Tensor:
        inputs = batch.to(self.device)
        with self.precision.autocast():
            loss: Tensor = self.forward(**inputs.model_inputs(), num_items_in_batch=count).loss
        scaler = self.precision.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        broken = self.world.all_any(~(torch.isfinite(loss) & torch.isfinite(norm)))
        optimizer: Any = self.optimizer
        scaler = self.precision.scaler
        if self.deferred:
            optimizer.found_inf, optimizer.grad_scale = broken.float(), None
            optimizer.step()
        elif scaler is not None:
            if torch.isfinite(loss):
                scaler.step(optimizer)
            scaler.update()
        elif not broken:
            optimizer.step()

    def _result(self, numbers: Tensor) -> StepResult:
        scale = self.precision.scaler.get_scale() if self.precision.scaler is not None else None
        if not self.deferred or self.device.type != "cuda":
            return StepResult(numbers, scale)
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return StepResult(host, scale, ready)
