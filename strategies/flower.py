"""Flower's own strategies, by name and with the parameters of their algorithms only.

What each computes is Flower's code, unchanged. `fedsim.core.adapter.Adapted` puts them into the
round loop: they see trainable parameters only, in order of client number; BatchNorm statistics are
averaged beside them, results are cast back to the model's dtypes, and the cohort is sampled by the
runner, from the run's seed.
"""

from __future__ import annotations

from flwr.serverapp import strategy as flower

from fedsim.core.errors import require


class FedAvgM(flower.FedAvgM):
    """FedAvg with server momentum: ``v <- beta v + (w - mean)``, ``w <- w - lr v``.

    Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification*, 2019 (arXiv 1909.06335). The first round starts from ``v = w - mean``.
    Flower's own default of the momentum is 0, which is FedAvg.

    Args:
        server_learning_rate: the step lr.
        server_momentum: the factor beta, in [0, 1).

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedavg"

    def __init__(self, server_learning_rate: float = 1.0, server_momentum: float = 0.9) -> None:
        require(server_learning_rate > 0, "server_learning_rate", server_learning_rate, "above 0")
        require(0 <= server_momentum < 1, "server_momentum", server_momentum, "in [0, 1)")
        super().__init__(server_learning_rate=server_learning_rate, server_momentum=server_momentum)


def _check_adaptive(eta: float, tau: float, beta_1: float = 0.0, beta_2: float = 0.0) -> None:
    require(eta > 0, "eta", eta, "above 0")
    require(tau > 0, "tau", tau, "above 0")
    require(0 <= beta_1 < 1, "beta_1", beta_1, "in [0, 1)")
    require(0 <= beta_2 < 1, "beta_2", beta_2, "in [0, 1)")


class FedAdam(flower.FedAdam):
    """Adam on the server, with the mean update d as its gradient.

    Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, Algorithm 2:
    ``m <- beta_1 m + (1 - beta_1) d``, ``v <- beta_2 v + (1 - beta_2) d^2``,
    ``w <- w + eta m / (sqrt(v) + tau)``. Flower starts from ``v = 0`` (the paper: at least tau^2)
    and, unlike the paper, corrects eta for the bias of m and v, as if one step had been taken
    before the first: the factor of round t is ``sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))``.

    Args:
        eta: server learning rate.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        tau: degree of adaptivity; added to sqrt(v).

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedavg"

    def __init__(
        self, eta: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        _check_adaptive(eta, tau, beta_1, beta_2)
        super().__init__(eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)


class FedYogi(flower.FedYogi):
    """Yogi on the server, with the mean update d as its gradient.

    Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, Algorithm 2: as FedAdam without
    bias correction, and with ``v <- v - (1 - beta_2) d^2 sign(v - d^2)``. Flower starts from
    ``v = 0``.

    Args:
        eta: server learning rate.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        tau: degree of adaptivity; added to sqrt(v).

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedavg"

    def __init__(
        self, eta: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        _check_adaptive(eta, tau, beta_1, beta_2)
        super().__init__(eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)


class FedAdagrad(flower.FedAdagrad):
    """Adagrad on the server, with the mean update d as its gradient.

    Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, Algorithm 2:
    ``v <- v + d^2``, ``w <- w + eta d / (sqrt(v) + tau)``. Flower starts from ``v = 0`` and has no
    first moment.

    Args:
        eta: server learning rate.
        tau: degree of adaptivity; added to sqrt(v).

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedavg"

    def __init__(self, eta: float = 0.1, tau: float = 1e-3) -> None:
        _check_adaptive(eta, tau)
        super().__init__(eta=eta, tau=tau)


class FedMedian(flower.FedMedian):
    """The coordinate-wise median of the clients' models; numbers of examples do not matter.

    Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, ICML
    2018, Algorithm 1, option I, on models instead of gradients.
    """

    client = "fedavg"

    def __init__(self) -> None:
        super().__init__()


class FedTrimmedAvg(flower.FedTrimmedAvg):
    """The coordinate-wise trimmed mean of the clients' models; examples do not matter.

    Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, ICML
    2018, Algorithm 1, option II, on models instead of gradients.

    Args:
        beta: share of the values cut off at either end, in [0, 0.5).

    Raises:
        ConfigError: `beta` is out of its range.
    """

    client = "fedavg"

    def __init__(self, beta: float = 0.2) -> None:
        require(0 <= beta < 0.5, "beta", beta, "in [0, 0.5)")
        super().__init__(beta=beta)


class Krum(flower.Krum):
    """The one client model that is nearest to its neighbours.

    Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*,
    NeurIPS 2017. Of n models, each is scored by the sum of squared distances to the n - f - 2
    nearest others. The guarantee needs ``n >= 2 f + 3``; Flower does not check it.

    Args:
        num_malicious_nodes: the number f of attackers that is tolerated.

    Raises:
        ConfigError: it is negative.
    """

    client = "fedavg"

    def __init__(self, num_malicious_nodes: int = 0) -> None:
        require(num_malicious_nodes >= 0, "num_malicious_nodes", num_malicious_nodes, "0 or above")
        super().__init__(num_malicious_nodes=num_malicious_nodes)


class MultiKrum(flower.MultiKrum):
    """The mean, weighted by examples, of the client models with the best Krum scores.

    Blanchard et al. 2017, see `Krum`.

    Args:
        num_malicious_nodes: the number f of attackers that is tolerated.
        num_nodes_to_select: how many models are averaged; 1 is Krum, all of them FedAvg.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedavg"

    def __init__(self, num_malicious_nodes: int = 0, num_nodes_to_select: int = 1) -> None:
        require(num_malicious_nodes >= 0, "num_malicious_nodes", num_malicious_nodes, "0 or above")
        require(num_nodes_to_select >= 1, "num_nodes_to_select", num_nodes_to_select, "1 or above")
        super().__init__(
            num_malicious_nodes=num_malicious_nodes, num_nodes_to_select=num_nodes_to_select
        )


class Bulyan(flower.Bulyan):
    """Krum chooses n - 2 f models; of these, the mean of the n - 4 f values nearest the median.

    El Mhamdi, Guerraoui, Rouault, *The Hidden Vulnerability of Distributed Learning in Byzantium*,
    ICML 2018 (arXiv 1802.07927). The second step is coordinate by coordinate and unweighted.
    Flower chooses all n - 2 f models by one Multi-Krum pass; the paper runs Krum again after each
    choice. A round with fewer than ``4 f + 3`` replies leaves the model as it is, with a warning.

    Args:
        num_malicious_nodes: the number f of attackers that is tolerated.

    Raises:
        ConfigError: it is negative.
    """

    client = "fedavg"

    def __init__(self, num_malicious_nodes: int = 0) -> None:
        require(num_malicious_nodes >= 0, "num_malicious_nodes", num_malicious_nodes, "0 or above")
        super().__init__(num_malicious_nodes=num_malicious_nodes)
