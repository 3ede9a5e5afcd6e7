"""Which unlabelled examples to have labelled: the rules of active learning, on one client.

Rules give scores, of which the largest are taken (ties by lot), or choose a set as a whole. All
work on logits and features that were computed before; nothing here sees labels of open examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Features [n, F] and logits [n, C] of some examples by number."""


def ksas(local: Tensor, shared: Tensor, counts: Tensor) -> Tensor:
    """Knowledge-specialised scores: how far two models differ on the classes a client knows.

    ``P = softmax(z_local + log n)``, ``Q = softmax(z_global + log n)`` with n the client's labelled
    examples of each class, and ``D = (KL(P || Q) + KL(Q || P)) / 2`` (Cao et al., ICCV 2023, eqs.
    1-3). Classes without labelled examples are left out: with them log n is infinite, and the
    official expression becomes NaN for every example.

    Args:
        local: logits of the client's model, shape [n, C].
        shared: logits of the global model, shape [n, C].
        counts: labelled examples of each class, shape [C]; only their ratios matter.

    Returns:
        scores, float64 [n]; 0 where fewer than two classes are labelled.
    """
    present = counts > 0
    if not present.any():
        return torch.zeros(len(local), dtype=torch.float64)
    prior = counts[present].double().log()
    p = (local[:, present].double() + prior).log_softmax(-1)
    q = (shared[:, present].double() + prior).log_softmax(-1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, float64 [n]."""
    logs = logits.double().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def margin(logits: Tensor) -> Tensor:
    """Minus the gap between the two largest probabilities, float64 [n]."""
    top = logits.double().softmax(-1).topk(2, dim=-1).values
    return top[:, 1] - top[:, 0]


def least_confidence(logits: Tensor) -> Tensor:
    """Minus the largest probability, float64 [n]."""
    return -logits.double().softmax(-1).amax(-1)


def best(scores: Tensor, count: int, stream: np.random.Generator) -> Tensor:
    """Places of the `count` largest scores; which of equal ones is decided by lot."""
    lots = stream.random(len(scores))
    order = np.lexsort((lots, -scores.double().numpy()))
    return torch.from_numpy(order[:count].copy())


def coreset(features: Tensor, labelled: Tensor, count: int, stream: np.random.Generator) -> Tensor:
    """Greedy k-centre: again and again the example farthest from all centres.

    Sener and Savarese, ICLR 2018. The centres begin with the labelled examples; where there are
    none, with one example drawn by lot.

    Args:
        features: of the candidates, shape [n, F].
        labelled: of the labelled examples, shape [m, F].
        count: how many to choose.
        stream: for that lot.
    """
    x = features.double()
    if len(labelled):
        far, chosen = torch.cdist(x, labelled.double()).amin(1), []
    else:
        first = int(stream.integers(len(x)))
        far, chosen = torch.cdist(x, x[first : first + 1])[:, 0], [first]
    far[chosen] = -1.0  # of equal examples the other one may still be chosen, this one not
    while len(chosen) < count:
        place = int(far.argmax())
        chosen.append(place)
        far = torch.minimum(far, torch.cdist(x, x[place : place + 1])[:, 0])
        far[chosen] = -1.0
    return torch.tensor(chosen[:count])


def badge(features: Tensor, logits: Tensor, count: int, stream: np.random.Generator) -> Tensor:
    """BADGE: k-means++ seeding on gradient embeddings (Ash et al., ICLR 2020).

    The embedding of an example is the gradient of the last layer if the predicted class were its
    label, ``(p - onehot(argmax p)) x feature``. First the longest one, then by lot in proportion
    to the squared distance to the nearest chosen. Distances come from inner products of the two
    factors, so no embedding is ever built.
    """
    f, a = features.double(), _pull(logits)
    length = a.square().sum(1) * f.square().sum(1)
    chosen = [int(length.argmax())]
    near = torch.full_like(length, np.inf)
    while len(chosen) < count:
        i = chosen[-1]
        near = torch.minimum(near, length + length[i] - 2 * (a @ a[i]) * (f @ f[i]))
        near = near.clamp_min(0.0)
        near[chosen] = 0.0
        chance = near.numpy()
        if chance.sum() > 0:
            place = int(stream.choice(len(chance), p=chance / chance.sum()))
        else:  # only copies of chosen ones are left
            left = np.setdiff1d(np.arange(len(chance)), chosen)
            place = int(left[int(stream.integers(len(left)))])
        chosen.append(place)
    return torch.tensor(chosen)


def _pull(logits: Tensor) -> Tensor:
    """``p - onehot(argmax p)``, float64 [n, C]."""
    p = logits.double().softmax(-1)
    p[torch.arange(len(p)), p.argmax(-1)] -= 1.0
    return p


def logo(
    local: tuple[Tensor, Tensor], shared: Tensor, count: int, stream: np.random.Generator
) -> Tensor:
    """LoGo: clusters by the local model, in each of them the example least clear to the global.

    Kim et al., *Re-thinking Federated Active Learning based on Inter-class Diversity*, CVPR 2023:
    k-means with `count` clusters on gradient embeddings of the local model, then the largest
    entropy under the global model in each cluster. Clusters that stay empty are made up for by the
    next ones in entropy, one from each cluster in turn.

    Args:
        local: features and logits of the local model.
        shared: logits of the global model.
        count: how many to choose.
        stream: seeds k-means.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    features, logits = local
    embedding = (_pull(logits)[:, :, None] * features.double()[:, None, :]).flatten(1).numpy()
    means = KMeans(count, n_init=1, random_state=int(stream.integers(2**31)))
    with warnings.catch_warnings():  # clusters that stay empty are made up for below
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = means.fit(embedding).labels_
    unclear = entropy(shared).numpy()
    order = np.lexsort((np.arange(len(found)), -unclear))
    turn = np.empty(len(found), np.int64)  # the how manieth of its cluster it is
    for cluster in np.unique(found):
        inside = order[found[order] == cluster]
        turn[inside] = np.arange(len(inside))
    return torch.from_numpy(np.lexsort((-unclear, turn))[:count].copy())


@dataclass(frozen=True)
class Candidates:
    """What the rules may look at.

    Attributes:
        rows: examples that may be chosen, numbers int64 [n].
        labelled: the labelled examples, numbers.
        counts: labelled examples of each class.
        local: looks with the client's own model.
        shared: looks with the global model.
        judge: the model that rules with one model ask: ``"global"`` or ``"local"``.
        stream: decides by lot.
    """

    rows: Tensor
    labelled: Tensor
    counts: Tensor
    local: Look
    shared: Look
    judge: str
    stream: np.random.Generator

    @property
    def look(self) -> Look:
        """The model that rules with one model ask."""
        return self.local if self.judge == "local" else self.shared

    @cached_property
    def scores(self) -> dict[str, Callable[[], Tensor]]:
        """Scores by the name of the rule."""
        return {
            "random": lambda: torch.zeros(len(self.rows)),
            "entropy": lambda: entropy(self.look(self.rows)[1]),
            "margin": lambda: margin(self.look(self.rows)[1]),
            "least_confidence": lambda: least_confidence(self.look(self.rows)[1]),
            "ksas": lambda: ksas(self.local(self.rows)[1], self.shared(self.rows)[1], self.counts),
        }

    def choose(self, rule: str, count: int) -> tuple[Tensor, Tensor]:
        """Places of the chosen examples, and the scores of all (empty where a rule has none)."""
        if rule in self.scores:
            scores = self.scores[rule]()
            return best(scores, count, self.stream), scores
        if rule == "coreset":
            labelled = self.look(self.labelled)[0]
            places = coreset(self.look(self.rows)[0], labelled, count, self.stream)
        elif rule == "badge":
            places = badge(*self.look(self.rows), count, self.stream)
        else:
            shared = self.shared(self.rows)[1]
            places = logo(self.local(self.rows), shared, count, self.stream)
        return places, torch.empty(0)


RULES = (
    "random",
    "entropy",
    "margin",
    "least_confidence",
    "coreset",
    "badge",
    "logo",
    "ksas",
)
"""Names of the rules."""
