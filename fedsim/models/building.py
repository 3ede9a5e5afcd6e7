"""From `[model]` of an experiment to a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fedsim.core.errors import ConfigError
from fedsim.core.rng import SERVER, isolated, key
from fedsim.core.text import tame
from fedsim.data.arguments import call
from fedsim.data.federated import FederatedData

if TYPE_CHECKING:
    from fedsim.config import Named


def build(spec: Named, data: FederatedData, seed: int) -> nn.Module:
    """A freshly initialised model, in training mode; the same weights for the same seed.

    Args:
        spec: the experiment's `[model]`: a built-in name, or ``"package.module:Class"``. A class or
            function of yours gets, if it has parameters of these names, `data`, `input_shape`,
            `num_outputs` and `seed`, and the table's other keys.
        data: what it will be trained on.
        seed: of the initial weights. torch's global generator is left as it was.

    Raises:
        ConfigError: unknown name, wrong parameters, or a model that does not fit the data.
    """
    with isolated(key(seed, 0, SERVER, "model")):
        model = call(
            "models",
            spec.name,
            "model",
            spec.params,
            data=data,
            input_shape=data.input_shape,
            num_outputs=data.num_outputs,
            seed=seed,
        )
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model = {spec.name!r} gave {type(model).__name__}; a torch.nn.Module is needed"
            )
        _try(spec.name, model, data)
    return model.train()


def _try(name: str, model: nn.Module, data: FederatedData) -> None:
    """Run two examples through it, so that a misfit is found before the first round."""
    x, y = data.fields["x"][:2], data.fields["y"][:2]
    try:
        with torch.no_grad():
            outputs = model.eval()(x)
    except Exception as error:  # a user's module raises whatever it raises
        raise ConfigError(
            f"model = {name!r} cannot read x of shape {tuple(x.shape)} and type {x.dtype} "
            f"(dataset {data.name}): {type(error).__name__}: {tame(str(error))}"
        ) from error
    wanted = (*y.shape[: 2 if data.criterion == "next_token" else 1], data.num_outputs)
    shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if shape != wanted and not (data.criterion == "mse" and shape == tuple(y.shape)):
        raise ConfigError(
            f"model = {name!r} gives outputs {shape} for {len(x)} examples of dataset {data.name}; "
            f"{wanted} is needed"
        )
