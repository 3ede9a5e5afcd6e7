"""FFA-LoRA."""

from __future__ import annotations

from flwr.app import ArrayRecord

from fedsim.core.lora.serving import OneFactor
from fedsim.core.records import FlatRecord, from_record
from fedsim.core.strategy import Served
from strategies.fedavg import FedAvg


class FFALoRA(OneFactor, FedAvg):
    """FFA-LoRA: A stays as it was initialised, the same for all; only B is trained, and travels.

    Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024. The mean of B
    is then the mean of the updates, exactly: ``sum p_i B_i A_0 = (sum p_i B_i) A_0``. Every client
    makes A for itself from the run's seed.

    Args:
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `server_lr` is not above 0, or the model has no low-rank updates.
    """

    client = "ffa_lora"
    stays = "a"

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """The model with the initial A, where the server knows it."""
        initial, layout = self.setting.initial, self.setting.info.layout
        if initial is None:
            return super().models(arrays)
        whole = from_record(initial) | from_record(arrays)
        beside = {n: whole[n] for n in layout.beside}
        return {"model": Served(FlatRecord(layout, layout.flatten(whole), beside))}
