"""One optimizer step: accumulate the gradient of the global batch, clip it, guard it, update.

The loss is the mean over all target tokens of the step, however they are divided into micro-batches and processes: they
are counted first, and each micro-batch adds its sum over that count. Gradients are summed over the processes once,
with the last micro-batch (replicas.py, sharded.py). On a GPU nothing here waits for the
device, except where an optimizer cannot skip a step by itself or where the loss is scaled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from fat5.data import PackedBatch
from fat5.errors import ConfigurationError
from fat5.model.activations import checkpoint_activations
from fat5.optim import skips_on_device
from fat5.train.config import RunConfig, shard_size
from fat5.train.cuda_graph import GraphedBackward
from fat5.train.precision import LEAST_LOSS_SCALE, Precision
from fat5.train.replicas import Replicas
from fat5.train.sharded import Shards
from fat5.train.world import World

# Without `deterministic` the compiler times several forms of a reduction and keeps the fastest: another run may keep
# another, which rounds otherwise.
COMPILATION = {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}}


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
        self._objective = objective
        model.to(dtype=self.precision.weight_dtype).train()
        checkpoint_activations(model, config.checkpointing)
        on_gpu = self.device.type == "cuda"
        self.compiled = compiled = config.compile is True or (config.compile == "auto" and on_gpu)
        shards = shard_size(config) if world.size > 1 else 1
        kind = Shards if shards > 1 else Replicas
        possible = compiled and on_gpu and self.precision.scaler is None
        recorded = bool(possible and config.cuda_graphs)
        if config.cuda_graphs is True and not possible:
            how = "compiled" if compiled else "not compiled"
            raise ConfigurationError(
                f"cuda_graphs is true, the model is {how} and runs in {config.precision} on {self.device.type}",
                hint="CUDA graphs need a GPU and a compiled model, no fp16: say auto",
            )
        self.parallel: Replicas | Shards = (
            Shards(model, world, self.precision, shards) if shards > 1 else Replicas(model, world, overlap=not recorded)
        )
        self.forward = objective(model)
        if compiled:
            self.forward = self.parallel.compile(self.forward, COMPILATION)
        self.optimizer = self.parallel.build_optimizer(config.optimizer)
        self.weights = self.parallel.weights
        # If the optimizer can, it skips on the device, and the host reads the numbers a step later.
        self.deferred = on_gpu and skips_on_device(self.optimizer) and self.precision.scaler is None
        self._backward: Callable[[PackedBatch, Tensor], Tensor] = self._forward_backward
        self._gradients: Callable[[Sequence[PackedBatch], Tensor], list[Tensor]] = self._accumulate
        if recorded and kind.records_steps:
            self._gradients = GraphedBackward(self._accumulate, self.weights, self.device)
        elif recorded:
            one = GraphedBackward(self._one_by_one, self.weights, self.device)
            self._backward = lambda batch, count: one([batch], count)[0]

    def gathered(self) -> tuple[Any, Any]:
        """A model with whole weights, and the module that a step runs, for the main process alone; called by all."""
        model = self.parallel.gathered()
        return model, self.forward if model is self.parallel.model else self._objective(model)

    def run(self, batches: Sequence[PackedBatch], rate: float) -> StepResult:
        """Makes a step at `rate` times the peak learning rate.

        A loss or gradient that is not finite leaves weights and optimizer untouched.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        count = torch.full((), float(sum(batch.num_items for batch in batches)), device=self.device)
        self.world.all_sum(count)
        self.parallel.before_step()
        losses = self._gradients(batches, count)
        scaler = self.precision.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = self.parallel.norm()
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

    def _accumulate(self, batches: Sequence[PackedBatch], count: Tensor) -> list[Tensor]:
        """Losses of the micro-batches; leaves the gradients, summed over micro-batches and processes."""
        losses = [self._backward(batch, count) for batch in batches[:-1]]
        with self.parallel.summing():
            losses.append(self._backward(batches[-1], count))
        return losses

    def _one_by_one(self, batches: Sequence[PackedBatch], count: Tensor) -> list[Tensor]:
        return [self._forward_backward(batch, count) for batch in batches]

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
