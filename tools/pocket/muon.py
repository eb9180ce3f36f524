"""Muon for the matrices inside networks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .averaging import AveragedTraining

OUTER = ("head.", "embed", "proj_out")  # parts of names: what reads the inputs, what gives the outputs, other heads


def is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight is a matrix, and neither of the input nor of the output."""
    return parameter.ndim == 2 and not any(part in name for part in OUTER)


class MuonAdamW:
    """The optimizer of a training.

    An update of Muon (Jordan et al. 2024) has singular values near 1, here at AdamW's root mean square (Liu et al.
    2025, arXiv:2502.16982), so that both can share a learning rate.

    Args:
        training: says its parameters, and the recipe's rate of the matrices.
        share: of that rate for everything else; kept in its group, where the training reads it.
    """

    def __init__(self, training: AveragedTraining, share: float) -> None:
        named, recipe = list(zip(training.names, training.parameters, strict=True)), training.recipe
        inside = [parameter for name, parameter in named if is_inner(name, parameter)]
        outside = [parameter for name, parameter in named if not is_inner(name, parameter)]
        common: dict[str, Any] = {"lr": recipe.rate, "weight_decay": recipe.weight_decay}
        self.muon = torch.optim.Muon(inside, **common, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": outside, "rate_share": share}]
        self.adamw = torch.optim.AdamW(groups, **common, betas=recipe.betas, fused=True)
        self.inside = len(inside)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Both optimizers' groups: the inner matrices, then everything else."""
        return self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def step(self) -> None:
        """Update all parameters."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states as that of one: the second one's parameters are numbered after the first one's."""
        first, second = self.muon.state_dict(), self.adamw.state_dict()
        later = {self.inside + index: entries for index, entries in second["state"].items()}
        return {"state": first["state"] | later, "param_groups": first["param_groups"] + second["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that :meth:`state_dict` gave."""
        first = {index: entries for index, entries in state["state"].items() if index < self.inside}
        later = {index - self.inside: entries for index, entries in state["state"].items() if index >= self.inside}
        self.muon.load_state_dict({"state": first, "param_groups": state["param_groups"][:1]})
        self.adamw.load_state_dict({"state": later, "param_groups": state["param_groups"][1:]})
