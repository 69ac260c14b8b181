"""AdamWScale: AdamW whose step is scaled by the RMS of each weight matrix, as Adafactor's "relative step" does.

For a weight w with gradient g, at step t (counted from 1):

    m ← β₁ m + (1 − β₁) g                       v ← β₂ v + (1 − β₂) g²
    s = max(s₀, RMS(w))                         w ← w − lr·λ·w − lr·s · m̂ / (√v̂ + ε)

with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) (Loshchilov and Hutter 2019, algorithm 2, with the scale of Shazeer and
Stern 2018, section 8). T5's matrices have very unequal sizes; the scale lets one learning rate serve them all.
The least scale s₀ is 1e-3, Adafactor's ε₂: a matrix that starts at zero must be able to move.
The weight decay λ is decoupled and not scaled.

With `eps_before_correction` the last product is s · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε) (Kingma and Ba 2015, end of
section 2), as in the first FAT5, nanoT5 and the former AdamW of transformers: ε / √(1 − β₂ᵗ) where the formula has ε.

Three implementations of the same arithmetic: plain (the specification), fused (one pass a tensor, float32 only), and
Triton (three launches for all tensors of a group, any precision and Kahan; fat5.ops.choice says when). None of them
reads a device value on the host.

A weight may be some rows of a matrix whose others lie in other processes (attribute `rows_of`, fat5.train.parts): its
RMS is that of the matrix, from one sum over the processes for all weights of a step, which all of them make together.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


class AdamWScale(torch.optim.Optimizer):
    """AdamW with its step scaled by max(min_scale, RMS(weight)) of each matrix.

    Args:
        params: parameters or parameter groups.
        lr: the relative learning rate: 2e-2 moves a weight by about 2% of its matrix's RMS in a step.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; a step multiplies the weights by 1 − lr·weight_decay.
        min_scale: the least scale of a step.
        fused: one pass a tensor, for float32 weights and moments without Kahan. None: Triton's kernels where they are
            chosen, then the fused path where it applies, else the plain form. False: the plain form.
        kahan: keep the rounding error of each weight and add it back at the next step. None: for bf16 and fp16 weights.
        eps_before_correction: add eps to the root of the second moment before its bias is corrected, as the first FAT5
            does; early steps with small gradients are shorter. It has no fused path of torch.
        state_dtype: dtype of the first moment. None: float32 for bf16 and fp16 weights, else that of the weight. The
            second moment is never narrower than float32: it moves by 1 − β₂ = 0.1% a step, less than bf16 can resolve.

    Raises:
        ValueError: an argument out of range, or `fused` asked for where it does not apply.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        min_scale: float = 1e-3,
        *,
        fused: bool | None = None,
        kahan: bool | None = None,
        state_dtype: torch.dtype | None = None,
        eps_before_correction: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("min_scale", min_scale)):
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if fused and eps_before_correction:
            raise ValueError("fused adds eps after the bias correction: leave it out with eps_before_correction")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating dtype, got {state_dtype}")
        self._fused, self._kahan, self._state_dtype = fused, kahan, state_dtype
        self._eps_before_correction = eps_before_correction
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "min_scale": min_scale}
        super().__init__(params, defaults)
        if fused:
            for weight in self._weights():
                if not self._can_fuse(weight):
                    raise ValueError(
                        f"fused needs contiguous float32 weights and moments without Kahan, got {weight.dtype} of "
                        f"strides {weight.stride()}"
                    )

    @property
    def skips_on_device(self) -> bool:
        """True if a step honours `self.found_inf` (a float32 scalar on the device; non-zero leaves all untouched)."""
        return all(self._counts_on_device(weight) for weight in self._weights())

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        used = [weight for weight in self._weights() if weight.grad is not None and weight.numel()]
        rms = _rms_of_matrices(used)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None and weight.numel()]
            triton = [weight for weight in weights if self._uses_triton(weight)]
            fused = [weight for weight in weights if self._uses_fused(weight)]
            rest = [weight for weight in weights if not self._counts_on_device(weight)]
            if found_inf is not None and rest:
                raise RuntimeError(
                    "found_inf is honoured by the fused and Triton paths only; check the flag before step()"
                )
            for weight in weights:
                self._prepare(weight)
            for alike in _alike(triton, self.state):
                _triton_step(alike, self.state, group, found_inf, self._eps_before_correction, rms)
            _fused_step(fused, self.state, group, found_inf, rms)
            for weight in rest:
                _plain_step(weight, self.state[weight], group, self._eps_before_correction, rms)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the moments in the dtype they were saved in (torch's own would cast them to the weight's)."""
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, weight in zip(saved_ids, self._weights(), strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                device = torch.device("cpu") if key == "step" and not self._counts_on_device(weight) else weight.device
                self.state[weight][key] = value.detach().to(device, copy=True)

    def _weights(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _compensates(self, weight: Tensor) -> bool:
        return weight.dtype in LOW_PRECISION if self._kahan is None else self._kahan

    def _moment_dtype(self, weight: Tensor) -> torch.dtype:
        return self._state_dtype or (torch.float32 if weight.dtype in LOW_PRECISION else weight.dtype)

    def _can_fuse(self, weight: Tensor) -> bool:
        exact = weight.dtype == torch.float32 == self._moment_dtype(weight) and not self._compensates(weight)
        if self._eps_before_correction:  # torch's fused step knows the other form
            return False
        # torch's fused step walks through memory, and would pair elements of unlike layouts.
        return exact and weight.is_contiguous() and weight.device.type in ("cpu", "cuda")

    def _uses_fused(self, weight: Tensor) -> bool:
        if self._fused is None:
            return self._can_fuse(weight) and not self._uses_triton(weight)
        return self._fused

    def _uses_triton(self, weight: Tensor) -> bool:
        if self._fused is not None or type(weight) not in (Tensor, torch.nn.Parameter):
            return False
        if not weight.is_contiguous() or (weight.grad is not None and not weight.grad.is_contiguous()):
            return False
        from fat5.ops.choice import uses_triton

        return self._moment_dtype(weight) != torch.float64 and uses_triton("adamw_scale", weight)

    def _counts_on_device(self, weight: Tensor) -> bool:
        """Fused and Triton kernels need the step count on the weight's device; the plain form reads it on the host."""
        return self._uses_fused(weight) or self._uses_triton(weight)

    def _prepare(self, weight: Tensor) -> None:
        state = self.state[weight]
        beside = weight.device if self._counts_on_device(weight) else torch.device("cpu")
        if state:
            # Moves only when the path has changed since the last step.
            state["step"] = state["step"].to(beside)
            return
        state["step"] = torch.zeros((), device=beside)
        state["exp_avg"] = torch.zeros_like(
            weight, dtype=self._moment_dtype(weight), memory_format=torch.preserve_format
        )
        second = torch.float32 if weight.dtype in LOW_PRECISION else weight.dtype
        state["exp_avg_sq"] = torch.zeros_like(weight, dtype=second, memory_format=torch.preserve_format)
        if self._compensates(weight):
            state["compensation"] = torch.zeros_like(weight, memory_format=torch.preserve_format)


def _rms_of_matrices(weights: list[Tensor]) -> dict[Tensor, Tensor]:
    """The root mean square of each weight if some are rows of a matrix; nothing if none is."""
    matrices = [getattr(weight, "rows_of", None) for weight in weights]
    meshes = [matrix.device_mesh for matrix in matrices if matrix is not None]
    if not meshes:
        return {}
    import torch.distributed as dist

    norms = list(torch._foreach_norm(weights, 2, torch.promote_types(weights[0].dtype, torch.float32)))
    places = [place for place, matrix in enumerate(matrices) if matrix is not None]
    squares = torch.stack([norms[place] for place in places]).square()
    dist.all_reduce(squares, group=meshes[0].get_group(meshes[0].ndim - 1))
    for place, norm in zip(places, squares.sqrt(), strict=True):
        norms[place] = norm
    sizes = [(weight if matrix is None else matrix).numel() for weight, matrix in zip(weights, matrices, strict=True)]
    return dict(zip(weights, torch._foreach_div(norms, [math.sqrt(size) for size in sizes]), strict=True))


def _plain_step(
    weight: Tensor, state: dict[str, Tensor], group: dict[str, Any], eps_before_correction: bool, rms: Any = None
) -> None:
    """The specification: one weight, written as in the module's docstring."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    state["step"] += 1
    correction1, correction2 = (1 - beta ** state["step"].item() for beta in (beta1, beta2))
    work = state["exp_avg_sq"].dtype
    grad, wide = weight.grad.to(work), weight.to(work)  # type: ignore[union-attr]
    scale = (rms[weight].to(work) if rms else wide.norm() / math.sqrt(weight.numel())).clamp_min(group["min_scale"])
    exp_avg = state["exp_avg"].to(work).lerp(grad, 1 - beta1)
    state["exp_avg"].copy_(exp_avg)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    eps = group["eps"] / math.sqrt(correction2) if eps_before_correction else group["eps"]
    root = state["exp_avg_sq"].sqrt().div_(math.sqrt(correction2)).add_(eps)
    update = exp_avg.div_(root).mul_(scale).mul_(-lr / correction1)
    update.add_(wide, alpha=-lr * group["weight_decay"])
    if "compensation" in state:
        update.add_(state["compensation"])
        weight.copy_(wide + update)
        state["compensation"].copy_(update - (weight.to(work) - wide))
    else:
        weight.copy_(wide + update)


def _fused_step(weights: list[Tensor], state: Any, group: dict[str, Any], found_inf: Tensor | None, rms: Any) -> None:
    """The same in one pass a tensor: torch's fused AdamW, given lr·scale of each matrix as a device scalar."""
    if not weights:
        return
    beta1, beta2 = group["betas"]
    scales: Any = [rms[weight].clone() for weight in weights] if rms else torch._foreach_norm(weights, 2)
    if not rms:
        torch._foreach_div_(scales, [math.sqrt(weight.numel()) for weight in weights])
    torch._foreach_clamp_min_(scales, group["min_scale"])
    if group["weight_decay"]:
        _decay(weights, group["lr"] * group["weight_decay"], found_inf)
    torch._foreach_mul_(scales, group["lr"])
    steps = [state[weight]["step"] for weight in weights]
    torch._foreach_add_(steps, 1)
    for weight, step, rate in zip(weights, steps, scales, strict=True):
        torch._fused_adamw_(
            [weight],
            [weight.grad.contiguous()],  # type: ignore[union-attr]
            [state[weight]["exp_avg"]],
            [state[weight]["exp_avg_sq"]],
            [],
            [step],
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


def _triton_step(
    weights: list[Tensor],
    state: Any,
    group: dict[str, Any],
    found_inf: Tensor | None,
    eps_before_correction: bool,
    rms: Any,
) -> None:
    """The same for weights of one device and one set of dtypes, in three launches."""
    from fat5.ops.triton.adamw_scale import adamw_scale_

    states = [state[weight] for weight in weights]
    adamw_scale_(
        weights,
        [weight.grad for weight in weights],
        [own["exp_avg"] for own in states],
        [own["exp_avg_sq"] for own in states],
        [own["compensation"] for own in states if "compensation" in own],
        [own["step"] for own in states],
        found_inf,
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["min_scale"],
        eps_before_correction,
        torch.stack([rms[weight] for weight in weights]) if rms else None,
    )


def _decay(weights: list[Tensor], rate: float, found_inf: Tensor | None) -> None:
    if found_inf is None:
        torch._foreach_mul_(weights, 1 - rate)
    else:
        torch._foreach_mul_(weights, 1 - rate * (1 - found_inf))


def _alike(weights: list[Tensor], state: Any) -> list[list[Tensor]]:
    """Weights that share device and dtypes."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for weight in weights:
        own = state[weight]
        key = (weight.device, weight.dtype, weight.grad.dtype, own["exp_avg"].dtype, "compensation" in own)  # type: ignore[union-attr]
        alike.setdefault(key, []).append(weight)
    return list(alike.values())
