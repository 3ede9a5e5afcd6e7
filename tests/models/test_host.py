"""Adapters over one resident base: equal to plain peft, strict, and the base as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedsim.core.criteria import criterion
from fedsim.core.errors import DataError
from fedsim.core.lora import Factors
from fedsim.core.model import FlatModel
from fedsim.core.rng import isolated
from fedsim.models.adapters import PeftAdapter, read_adapter, write_adapter
from fedsim.models.exporting import base_digest, save_adapter, to_adapter, unwrap
from fedsim.models.host import Host
from fedsim.models.language import CausalLM
from fedsim.models.lora import adapt
from fedsim.models.merging import merge
from fedsim.models.text import CharGPT

VOCABULARY, LENGTH = 50, 12
TOKENS = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY


def char_gpt() -> nn.Module:
    return CharGPT(VOCABULARY, LENGTH, 16, 2, 2)


def llama(layers: int = 2) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
            attn_implementation="eager",
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager",
        )
    )  # fmt: skip


BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "char_gpt": (char_gpt, ["attend", "contract"]),
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}


def made(kind: str) -> nn.Module:
    """A base; the same weights every time."""
    with isolated(3):
        return BASES[kind][0]().eval()


def ours(kind: str, seed: int = 0, rank: int = 4, **options: bool) -> FlatModel:
    """The base with an adapter that was trained: no factor is zero."""
    inner = made(kind)
    module = inner if kind == "char_gpt" else CausalLM(inner, VOCABULARY)
    with isolated(seed):
        module = adapt(module, rank, 2.0, BASES[kind][1], **options)
    model = FlatModel(module.eval(), criterion("next_token"))
    draw = torch.Generator().manual_seed(seed)
    flat = model.initial().flat
    flat += 0.1 * torch.randn(flat.shape, generator=draw)
    return model


def adapter_of(model: FlatModel) -> PeftAdapter:
    return to_adapter(model.module, model.initial())


def ours_at(model: FlatModel) -> Tensor:
    return model.outputs(model.initial().flat, dict(model.initial().beside), TOKENS)


def theirs(kind: str, folder: Path) -> Tensor:
    """Logits by plain peft."""
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(made(kind), folder)
    with torch.no_grad():
        found = loaded(TOKENS)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("options", [{}, {"delta": True}, {"head": True}], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_plain_peft_gives_our_logits(kind: str, options: dict, tmp_path: Path) -> None:
    if options == {"head": True} and kind != "char_gpt":
        pytest.skip("its head is tied to the embedding, or has no name of its own")
    model = ours(kind, **options)
    adapter = adapter_of(model)
    folder = write_adapter(adapter, tmp_path / "adapter")
    assert torch.allclose(theirs(kind, folder), ours_at(model), atol=1e-5)
    host = Host(made(kind))
    with host.wearing(read_adapter(folder)) as worn, torch.no_grad():
        found = worn(TOKENS)
    assert torch.allclose(getattr(found, "logits", found), ours_at(model), atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_merged_adapters_give_peft_and_us_the_same(kind: str, tmp_path: Path) -> None:
    many = [adapter_of(ours(kind, seed, rank)) for seed, rank in ((1, 2), (2, 4), (3, 3))]
    for method in ("lego", "ensemble", "flexlora"):
        folder = write_adapter(merge(many, method), tmp_path / method)
        host = Host(made(kind))
        with host.wearing(read_adapter(folder)) as worn, torch.no_grad():
            found = worn(TOKENS)
        assert torch.allclose(getattr(found, "logits", found), theirs(kind, folder), atol=1e-5)


def test_rolling_through_adapters_leaves_the_base_as_it_was() -> None:
    base = made("char_gpt")
    plain, before = base(TOKENS), base_digest(base)
    host = Host(base)
    with host.wearing(None) as bare:
        assert torch.equal(bare(TOKENS), plain)
    models = [ours("char_gpt", seed, head=True) for seed in range(3)]
    for model in (*models, *models):
        with host.wearing(adapter_of(model)) as worn:
            assert torch.allclose(worn(TOKENS), ours_at(model), atol=1e-5)
    assert torch.equal(base(TOKENS), plain)
    assert base_digest(host.module) == before == host.digest


@pytest.mark.parametrize("kind", ["char_gpt", "gpt2"])
def test_answering_together_is_answering_one_by_one(kind: str) -> None:
    host = Host(CausalLM(made(kind), VOCABULARY) if kind != "char_gpt" else made(kind),
                "" if kind == "char_gpt" else "inner.")  # fmt: skip
    many = [adapter_of(ours(kind, seed, rank)) for seed, rank in ((1, 2), (2, 4), (3, 3))]
    many[1].factors.pop(next(iter(many[1].factors)))  # type: ignore[attr-defined]
    alone = host.outputs(many, TOKENS, together=False)
    together = host.outputs(many, TOKENS, together=True)
    assert together.shape == (3, 2, LENGTH, VOCABULARY)
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.equal(host.outputs(many, TOKENS), together)  # so few positions
    headed = [adapter_of(ours("char_gpt", s, head=True)) for s in range(2)]
    if kind == "char_gpt":
        assert host.outputs(headed, TOKENS, together=True).shape[0] == 2


def test_what_does_not_belong_is_refused_and_changes_nothing() -> None:
    host, good = Host(made("char_gpt")), adapter_of(ours("char_gpt"))
    name, f = next(iter(good.factors.items()))
    wrong = {
        "no linear layer": PeftAdapter({"blocks.9.attend": f}),
        "is no linear layer of the base": PeftAdapter({"blocks.0.norm1": f}),
        "inputs and outputs": PeftAdapter({name: Factors(f.a[:, 1:], f.b)}),
        "base weights with the hash": PeftAdapter(good.factors, base_hash="0" * 64),
        "no weight": PeftAdapter(good.factors, saved={"other.weight": f.a}),
        "of shape": PeftAdapter(good.factors, saved={"head.weight": f.a}),
    }
    for reason, adapter in wrong.items():
        with pytest.raises(DataError, match=reason), host.wearing(adapter):
            pass
        with pytest.raises(DataError, match=reason):
            host.outputs([good, adapter], TOKENS)
    assert base_digest(host.module) == host.digest


def test_digest_is_that_of_the_base_alone() -> None:
    base = made("llama")
    before = base_digest(base)
    assert base_digest(ours("llama").module) == before
    assert base_digest(ours("llama", delta=True).module) == before
    assert base_digest(unwrap(ours("llama").module)) == before
    with torch.no_grad():
        next(base.parameters()).view(-1)[0] += 1e-3
    assert base_digest(base) != before


def test_merged_updates_are_exported_in_as_many_ranks_as_they_take(tmp_path: Path) -> None:
    model = ours("char_gpt", delta=True)
    state, layout = dict(model.initial().state()), model.layout
    draw = torch.Generator().manual_seed(5)
    for name in list(state):
        if name.endswith("delta"):
            out, width = state[name].shape
            low = torch.randn(out, 3, generator=draw) @ torch.randn(3, width, generator=draw)
            state[name] = 0.05 * low
        if name.endswith("lora_B"):
            state[name] = torch.zeros_like(state[name])
    folder = save_adapter(tmp_path / "a", model.module, {"model": state}, layout, None)
    assert folder is not None
    read = read_adapter(folder)
    assert {f.rank for f in read.factors.values()} == {3}
    found = model.outputs(layout.flatten(state), {}, TOKENS)
    assert torch.allclose(theirs("char_gpt", folder), found, atol=1e-5)
    assert save_adapter(tmp_path / "b", made("char_gpt"), {"model": {}}, layout, None) is None
