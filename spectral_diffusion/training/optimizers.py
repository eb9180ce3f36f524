"""Optimizers: AdamW, 8-bit AdamW or Prodigy, LoRA+ on top; learning rate schedules; a moving average of the weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import InjectedAdapter
from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..methods.registry import Method
from ..models.prompt_encoder import PromptEncoder
from .riemannian import Groups, preconditioned


class ProdigyGroups:
    """A Prodigy for each parameter group, since each component finds a step size of its own.

    Every Prodigy sees its group as one flat tensor: it estimates its step size from sums over all numbers, and reads
    them from the device twice for each tensor it is given. It has what the training loop, torch's loss scaler and the
    saved state use of an optimizer.
    """

    OWN = ("betas", "eps", "weight_decay", "d_coef")  # of a group: as the settings say, whatever a state says

    def __init__(self, groups: Groups, factor: float) -> None:
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise UserError("Prodigy needs prodigyopt: pip install 'spectral-diffusion[optim]'.") from error
        self.param_groups: Groups = [{**group, "lr": 1.0} for group in groups]
        self.flat = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]])) for group in groups]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decays weights
            self.parts: list[torch.optim.Optimizer] = [
                Prodigy([flat], lr=1.0, d_coef=factor, weight_decay=group["weight_decay"], safeguard_warmup=True)
                for flat, group in zip(self.flat, groups, strict=True)
            ]

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group, flat, part in zip(self.param_groups, self.flat, self.parts, strict=True):
            parameters: list[nn.Parameter] = group["params"]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            if all(p.grad is None for p in parameters):
                continue
            flat.copy_(torch.cat([p.flatten() for p in parameters]))
            flat.grad = torch.cat([grad.flatten() for grad in grads]).to(flat.dtype)
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
            flat.grad = None
            moved = flat.split([p.numel() for p in parameters])
            torch._foreach_copy_(
                list[Tensor](parameters), [value.view_as(p) for value, p in zip(moved, parameters, strict=True)]
            )

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer's of the flat tensors, numbered through."""
        states = [part.state_dict() for part in self.parts]
        state = {index: saved["state"][0] for index, saved in enumerate(states) if saved["state"]}
        return {
            "state": state,
            "param_groups": [{**saved["param_groups"][0], "params": [index]} for index, saved in enumerate(states)],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back.

        Raises:
            ValueError: of other groups.
        """
        for index, (part, saved) in enumerate(zip(self.parts, state_dict["param_groups"], strict=True)):
            own = {key: part.param_groups[0][key] for key in self.OWN}
            state = {0: state_dict["state"][index]} if index in state_dict["state"] else {}
            part.load_state_dict({"state": state, "param_groups": [{**saved, "params": [0]}]})
            part.param_groups[0].update(own)


Optimizer = torch.optim.Optimizer | ProdigyGroups


def check_optimizer(config: TrainConfig, method: Method) -> None:
    """Refuse LoRA+ and the Riemannian preconditioner where there are no factors A and B, or with Prodigy.

    Raises:
        UserError: so it is.
    """
    options = config.optimizer
    asked = {
        "optimizer.loraplus_lr_ratio": (options.loraplus_lr_ratio != 1, "1"),
        "optimizer.riemannian_reg": (options.riemannian_reg != 0, "0"),
    }
    for name, (is_on, off) in asked.items():
        if is_on and not (method.peft and method.peft.kind == "LORA"):
            raise UserError(
                f"{name} is for methods with LoRA's factors A and B; {method.name} has none.",
                Fix(name, off),
                Fix("method", "lora"),
            )
        if is_on and options.name == "prodigy":
            raise UserError(f"Prodigy finds every rate itself, which {name} would change.", Fix(name, off))


def build_optimizer(
    injected: InjectedAdapter, encoder: PromptEncoder, config: TrainConfig, factors: Mapping[str, float]
) -> tuple[Optimizer, list[float]]:
    """An optimizer with a group per component and learning-rate factor; returns it and the groups' initial rates.

    ``factors`` multiplies the rate of single layers. Weight decay never touches what is not neutral at zero: the token,
    DoRA's magnitudes. Prodigy finds the rates itself, one per group; a rate of 0 still keeps a component as it is.

    Raises:
        UserError: a package is missing, every rate is 0, or single layers' rates were asked of Prodigy.
    """
    name = config.optimizer.name
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for layer in injected.layers:
        component = layer.split(".", 1)[0]
        of_text = component.startswith("text_encoder")
        rate = config.text_encoder_learning_rate if of_text else config.learning_rate
        rate *= factors.get(layer, 1.0)
        for parameter_name, parameter in injected.parameters(layer).items():
            decay = 0.0 if parameter_name in injected.method.neutral else config.weight_decay
            # Components of one rate are one group, except where Prodigy finds a rate for each.
            own_group = component if name == "prodigy" else ""
            ratio = config.optimizer.loraplus_lr_ratio if parameter_name == "B" else 1.0
            groups.setdefault((rate * ratio, decay, own_group), []).append(parameter)
    listed: Groups = [
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay, _), parameters in groups.items()
    ]
    rows = list(encoder.named_parameters().values())
    if not any(rate > 0 for rate in (*(group["lr"] for group in listed), config.embedding_learning_rate)):
        raise UserError(
            "Every learning rate is 0, so nothing would be trained; set learning_rate, text_encoder_learning_rate or "
            "embedding_learning_rate above 0."
        )
    listed.append({"params": rows, "lr": config.embedding_learning_rate, "weight_decay": 0.0})
    if name == "prodigy":
        if config.slot_lr_power:
            raise UserError(
                "Prodigy finds every rate itself, so slots cannot have their own.", Fix("slot_lr_power", "0")
            )
        for group in listed:
            group["lr"] = float(group["lr"] > 0)
        prodigies = ProdigyGroups([group for group in listed if group["lr"] > 0], config.optimizer.d_coef)
        return prodigies, [group["lr"] for group in prodigies.param_groups]
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("8-bit AdamW needs bitsandbytes: pip install 'spectral-diffusion[optim]'.") from error
        return build_adam(AdamW8bit, listed, injected, config), [group["lr"] for group in listed]
    one_kernel = ("cuda", "cpu")  # where torch has one for all parameters: on a CPU a loop takes 1/25 of a step
    fused = all(row.device.type in one_kernel for group in listed for row in group["params"])
    return build_adam(torch.optim.AdamW, listed, injected, config, fused=fused), [group["lr"] for group in listed]


def build_adam(
    kind: type[torch.optim.Optimizer], groups: Groups, injected: InjectedAdapter, config: TrainConfig, **options: Any
) -> torch.optim.Optimizer:
    """An Adam of these groups, with PEFT's preconditioner of LoRA's gradients if it is asked for."""
    damping = config.optimizer.riemannian_reg
    return preconditioned(kind, groups, injected, damping, **options) if damping else kind(groups, **options)


def lr_schedule(name: str, steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """The factor on every learning rate by step, counted from 0: diffusers' schedule of that name."""
    from diffusers.optimization import get_scheduler

    # A schedule of diffusers needs an optimizer to write into; this one needs only the function of the step.
    name = "constant_with_warmup" if name == "constant" else name
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_scheduler(name, placeholder, num_warmup_steps=min(warmup_steps, steps - 1), num_training_steps=steps)
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


class EMA:
    """The exponential moving average of parameters by name, diffusers' ``EMAModel``; none with a decay of 0."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = dict(parameters)
        self.model = EMAModel(self.parameters.values(), decay=decay, foreach=True) if decay else None

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by name; empty without any."""
        return dict(zip(self.parameters, self.model.shadow_params, strict=True)) if self.model else {}

    def update(self, step: int) -> None:
        """Take in the parameters after ``step`` steps."""
        if self.model:
            self.model.optimization_step = step - 1
            self.model.step(self.parameters.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters be their averages for a while."""
        if not self.model:
            yield
            return
        self.model.store(self.parameters.values())
        self.model.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.model.restore(self.parameters.values())

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take saved averages back."""
        for name, value in self.averages.items():
            value.copy_(averages[name])
