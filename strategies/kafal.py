"""KAFAL."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import require
from strategies.active_learning import ActiveLearning


class KAFAL(ActiveLearning):
    """KAFAL: knowledge-specialised sampling (KSAS) and knowledge-compensatory update (KCFU).

    Cao, Shi, Yu, Wang, Tao, *Knowledge-Aware Federated Active Learning with Non-IID Data*, ICCV
    2023 (arXiv 2211.13579); after its official code, and the paper's Algorithm 1. A client chooses
    the examples with the largest

    ``D(x) = (KL(P || Q) + KL(Q || P)) / 2``,  ``P, Q = softmax(z_local + log n, z_global + log n)``

    with n its labelled examples of each class, and trains on ``CE(z + log n, y)`` plus, from the
    second round of a cycle on, the distillation ``mean_j w_j KL(global || local)(x_j) / C`` on
    unlabelled mixup images, ``w`` larger for classes rarer among its labels (0 for absent ones).

    Where the official code differs from a clean reading, the clean one is the default: absent
    classes are left out of D (the official expression is NaN on current torch, so that it selects
    by accident); mixup partners are a permutation (``mix = "single"``: one image for the whole
    batch); the teacher is in evaluation mode (``teacher = "train"``); distillation uses the current
    unlabelled examples (``unlabelled = "initial"``); integer buffers are not averaged. The paper's
    equations 4 to 6 are known from that code only.

    Args:
        participation: R; 0.8 in the code.
        strength: weight of the distillation.
        mix: ``"perm"`` or ``"single"``.
        mix_alpha: mixup's coefficient is drawn from Beta(alpha, alpha).
        teacher: ``"eval"`` or ``"train"``.
        unlabelled: ``"current"`` or ``"initial"``.
        options: of `ActiveLearning`.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    kcfu = True

    def __init__(
        self,
        participation: float | None = 0.8,
        strength: float = 1.0,
        mix: str = "perm",
        mix_alpha: float = 2.0,
        teacher: str = "eval",
        unlabelled: str = "current",
        **options: Any,
    ) -> None:
        super().__init__(**{"rule": "ksas", "participation": participation, **options})
        require(strength >= 0, "strength", strength, "0 or above")
        require(mix in ("perm", "single"), "mix", repr(mix), "'perm' or 'single'")
        require(mix_alpha > 0, "mix_alpha", mix_alpha, "above 0")
        require(teacher in ("eval", "train"), "teacher", repr(teacher), "'eval' or 'train'")
        both = ("current", "initial")
        require(unlabelled in both, "unlabelled", repr(unlabelled), "'current' or 'initial'")
        self._told |= {
            "strength": float(strength),
            "mix": mix,
            "alpha": float(mix_alpha),
            "teacher": teacher,
            "unlabelled": unlabelled,
        }
