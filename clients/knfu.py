"""Client half of KnFu and its relatives: models stay, knowledge on the public set travels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.core.agent import MODEL, Agent, AgentState, Trained
from fedsim.core.criteria import Criterion
from fedsim.core.distill import LOSSES
from fedsim.core.errors import RunError
from fedsim.core.knowledge import DIGEST, KNOWLEDGE, ROWS, SUBSET, VOTES, kulsif
from fedsim.core.program import LocalProgram
from fedsim.core.records import FlatRecord, from_record, to_record


def digest_bytes(digest: str) -> Tensor:
    """A hex digest as uint8 [n]."""
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Digestion(LocalProgram):
    """Local steps towards what others said of the public examples.

    Attributes:
        kind: a loss of `fedsim.core.distill`.
        temperature: softens the outputs.
    """

    kind: str = "kl"
    temperature: float = 1.0

    def loss(
        self, criterion: Criterion, outputs: Tensor, target: Tensor, weight: Tensor | None
    ) -> Tensor:
        """The loss of distillation; targets are probabilities or logits [B, C]."""
        return LOSSES[self.kind](outputs, target, self.temperature)


@dataclass(frozen=True, kw_only=True)
class KnFu(Agent):
    """A client with a model of its own, of any architecture.

    Attributes:
        steps: what to do, in order, separated by blanks: ``local`` (train on the own examples),
            ``digest`` (fit to the knowledge that was sent), ``extract`` (answer with the own
            knowledge), ``give`` (answer with the model). A model that was sent goes before the own.
        public: digest of the server's public set; the client's own must be the same.
        space: knowledge is ``"prob"`` (probabilities) or ``"logit"``.
        temperature: softens probabilities.
        half: send knowledge in half precision.
        digest_epochs: passes over the public examples in ``digest``.
        digest_batch: examples per minibatch there; 0: as in local training.
        digest_lr: learning rate there; 0: as in local training.
        digest_loss: a loss of `fedsim.core.distill`.
        ce: weight of private examples in ``digest``: after every pass over the public examples
            one over the own, at the learning rate times `ce`; 0: none.
        votes: say for which public examples the client's own density is large enough to vote.
        width: kernel width of that estimate; 0: median distance of the public examples.
        ridge: its regularisation.
        quantile: vote where the ratio is above this quantile of the client's own examples.
        hist: say the true label histogram (which the client then gives away).
    """

    any_model = True

    steps: str = "local extract"
    public: str = ""
    space: str = "prob"
    temperature: float = 1.0
    half: bool = False
    digest_epochs: int = 2
    digest_batch: int = 0
    digest_lr: float = 0.0
    digest_loss: str = "kl"
    ce: float = 0.0
    votes: bool = False
    width: float = 0.0
    ridge: float = 1e-3
    quantile: float = 0.25
    hist: bool = False

    def judged(self, s: AgentState) -> FlatRecord:
        """The client's own model, unless one was sent."""
        return s.sent_model() if "arrays" in s.records else s.kept_model(MODEL) or s.initial

    def answer(self, s: AgentState) -> None:
        """Do the steps, and keep the model."""
        if self.public and self.public != s.public_digest:
            raise RunError(
                f"the server's public set {self.public} is not the client's, "
                f"{s.public_digest or 'which has none'}"
            )
        model = self.judged(s)
        for step in self.steps.split():
            if step == "local":
                trained = s.train(self.local(LocalProgram), model)
                model = trained.record
                s.metrics.update({"loss": trained.metrics["loss"], "steps": trained.steps})
            elif step == "digest":
                model = self._digest(s, model)
            elif step == "extract":
                s.replies["arrays"] = self._knowledge(s, model)
            elif step == "give":
                s.replies["arrays"] = model
            else:
                raise RunError(f"steps = {self.steps!r}: {step!r} is unknown")
        if "arrays" not in s.records:  # the server does not hold it
            s.keep(MODEL, model)

    def _digest(self, s: AgentState, model: FlatRecord) -> FlatRecord:
        """Fit to the knowledge sent, of all public examples or of those that are named."""
        sent = from_record(s.records[KNOWLEDGE])
        target = self._fused(sent).to(s.initial.flat.dtype)
        rows = s.public[sent[ROWS]] if ROWS in sent else s.public
        y = torch.zeros(len(s.fields["y"]), target.shape[1], dtype=target.dtype)
        y[rows] = target
        program = self.local(
            Digestion,
            epochs=1,
            max_steps=0,
            batch_size=self.digest_batch or self.batch_size,
            lr=self.digest_lr or self.lr,
            kind=self.digest_loss,
        )
        losses: list[Trained] = []
        if not self.ce:
            whole = replace(program, epochs=self.digest_epochs)
            if self.digest_epochs:
                losses.append(s.train(whole, model, rows, fields={**s.fields, "y": y}))
        else:
            for _ in range(self.digest_epochs):
                done = s.train(program, model, rows, fields={**s.fields, "y": y})
                losses.append(done)
                again = self.local(LocalProgram, epochs=1, lr=program.lr * self.ce)
                private = s.train(again, done.record)
                model = private.record
                losses[-1] = done._replace(record=model)
        if not losses:
            return model
        s.metrics["digest_loss"] = losses[-1].metrics["loss"]
        return losses[-1].record

    @staticmethod
    def _fused(sent: dict[str, Tensor]) -> Tensor:
        """The knowledge to fit to: fused by the server, or everybody's to be fused here."""
        if "weights" not in sent:
            return sent[KNOWLEDGE]
        return torch.einsum("m,mic->ic", sent["weights"].double(), sent[KNOWLEDGE].double())

    def _knowledge(self, s: AgentState, model: FlatRecord) -> FlatRecord:
        rows = s.public
        if SUBSET in s.records:
            rows = rows[from_record(s.records[SUBSET])[ROWS]]
        logits = s.outputs(model, s.inputs(rows))
        said = logits if self.space == "logit" else (logits / self.temperature).softmax(-1)
        said = said.to(torch.float16 if self.half else s.initial.flat.dtype)
        entries = {KNOWLEDGE: said}
        if self.votes:
            entries[VOTES] = self._votes(s, rows).to(said.dtype)
        if self.hist:
            counts = torch.bincount(s.fields["y"][s.rows], minlength=s.num_outputs)
            entries["labels"] = counts.to(said.dtype)
        return to_record({**entries, DIGEST: digest_bytes(s.public_digest)})

    def _votes(self, s: AgentState, rows: Tensor) -> Tensor:
        """1 where the own examples are dense enough, by KuLSIF against uniform noise."""
        kept = s.kept("votes")
        if kept is None:
            known = s.inputs(s.rows).flatten(1).double()
            everything = s.inputs(s.public).flatten(1).double()
            low, high = everything.min(), everything.max()
            draw = s.stream("noise").random((min(len(known), 500), known.shape[1]))
            noise = low + (high - low) * torch.from_numpy(draw)
            width = self.width or float(torch.pdist(everything[:300]).median())
            ratio = kulsif(known, noise, width, self.ridge)
            kept = {"votes": (ratio(everything) > ratio(known).quantile(self.quantile)).double()}
            s.keep("votes", kept)
        return kept["votes"][torch.isin(s.public, rows)]
