"""LoRA adapters on disk: what peft wrote is read, what we write peft reads, the rest is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.core.errors import ConfigError, DataError
from fedsim.core.lora import Factors, flora
from fedsim.core.rng import isolated
from fedsim.models.adapters import (
    CONFIG,
    WEIGHTS,
    PeftAdapter,
    read_adapter,
    write_adapter,
)
from fedsim.models.merging import merge

A0 = "base_model.model.model.layers.1.q.lora_A.weight"
B0 = "base_model.model.model.layers.1.q.lora_B.weight"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound adapter of two modules."""
    factors = {
        f"model.layers.{i}.q": Factors(draw(2, 6, seed=i), draw(5, 2, seed=9 + i), 2.0)
        for i in (1, 11)
    }
    config = {"base_model_name_or_path": "tiny", "target_modules": ["q"]}
    return write_adapter(PeftAdapter(factors, config, base_hash="abc"), tmp_path / "good")


def edit(folder: Path, change: Callable[[dict, dict], Any]) -> Path:
    """Change configuration and tensors of an adapter in place."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS, {"base_hash": "abc"})
    return folder


def test_reads_what_it_wrote(good: Path) -> None:
    read = read_adapter(good)
    assert set(read.factors) == {"model.layers.1.q", "model.layers.11.q"}
    f = read.factors["model.layers.11.q"]
    assert f.scaling == 2.0
    assert torch.equal(f.a, draw(2, 6, seed=11))
    assert read.base_hash == "abc"
    with pytest.raises(DataError, match="holds an adapter already"):
        write_adapter(read, good)


def test_writes_the_same_bytes_every_time(good: Path, tmp_path: Path) -> None:
    """Metadata too, which the library writes in any order."""
    read = read_adapter(good)
    files = {(write_adapter(read, tmp_path / str(i)) / WEIGHTS).read_bytes() for i in range(12)}
    assert len(files) == 1


HOSTILE: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "rank": (lambda c, t: c.update(r=3), "wrong rank"),
    "rank type": (lambda c, t: c.update(r="2"), 'r = "2" must be'),
    "rank fraction": (lambda c, t: c.update(r=2.5), "no whole number"),
    "alpha nan": (lambda c, t: c.update(lora_alpha=float("nan")), "lora_alpha = NaN must be"),
    "alpha huge": (lambda c, t: c.update(lora_alpha=1e30), "lora_alpha = 1e"),
    "alpha negative": (lambda c, t: c.update(lora_alpha=-1), "must be above 0"),
    "swapped": (
        lambda c, t: t.update({k: t[k].T.contiguous() for k in (A0, B0)}), "A and B are swapped"),
    "swapped names": (lambda c, t: t.update({A0: t[B0], B0: t[A0]}), "swapped"),
    "missing": (lambda c, t: t.pop(B0), f"missing key {B0}"),
    "module": (lambda c, t: t.update({k.replace("1.q", "1.v"): v.clone() for k, v in [*t.items()]}),
               "not among the target_modules"),
    "base weight": (lambda c, t: t.update({"base_model.model.model.layers.1.q.weight": draw(5, 6)}),
                    "names a weight of the base model"),
    "base layer": (
        lambda c, t: t.update({"base_model.model.model.layers.1.q.base_layer.weight": draw(5, 6)}),
        "names a weight of the base model"),
    "path": (lambda c, t: t.update({"../x": draw(2)}), 'unexpected key "../x"'),
    "path in module": (lambda c, t: t.update({"base_model.model.../x.lora_A.weight": draw(2, 6)}),
                       "names no module"),
    "no prefix": (lambda c, t: t.update({"layers.1.q.lora_A.weight": draw(2, 6)}), "unexpected"),
    "embedding": (lambda c, t: t.update({"base_model.model.e.lora_embedding_A": draw(2, 6)}),
                  "embeddings is not supported"),
    "nan": (lambda c, t: t[A0].fill_(float("nan")), "NaN or infinity"),
    "vector": (lambda c, t: t.update({A0: draw(2)}), "must be matrices"),
    "kind": (lambda c, t: c.update(peft_type="IA3"), 'peft_type is "IA3"'),
    "dora": (lambda c, t: c.update(use_dora=True), "use_dora = true is not supported"),
    "bias": (lambda c, t: c.update(bias="all"), "bias"),
    "pissa": (lambda c, t: c.update(init_lora_weights="pissa"), "changes the base weights"),
    "endless pattern": (lambda c, t: c.update(rank_pattern={"(a+)+b": 2}), "not plain"),
    "endless target": (lambda c, t: c.update(target_modules="(.*)*(.*)*(.*)*q"), "not plain"),
    "broken pattern": (lambda c, t: c.update(alpha_pattern={"(q": 2}), "not valid"),
    "empty": (lambda c, t: t.clear(), "holds no LoRA factors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_adapter_is_refused(good: Path, fault: str) -> None:
    change, reason = HOSTILE[fault]
    with pytest.raises(DataError, match=re.escape(reason)) as error:
        read_adapter(edit(good, change))
    assert "\n" not in str(error.value)


def test_files_that_are_no_adapter(good: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"has no {CONFIG}"):
        read_adapter(tmp_path / "nowhere")
    (good / CONFIG).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_adapter(good)
    (good / CONFIG).write_text('{"peft_type": "LORA"}')
    (good / WEIGHTS).write_bytes(b"not safetensors at all")
    with pytest.raises(DataError, match="cannot be read"):
        read_adapter(good)
    (good / WEIGHTS).unlink()
    (good / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is a pickle"):
        read_adapter(good)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c, t: c.update(lora_alpha=2), "scaling (alpha over rank) is 1.0, 2.0 is needed"),
        (lambda c, t: [t.pop(k) for k in (A0, B0)], 'missing modules ["model.layers.1.q"]'),
        (lambda c, t: (c.update(target_modules=["q", "v"]),
                       t.update({k.replace("1.q", "2.v"): v.clone() for k, v in [*t.items()]})),
         "unexpected modules"),
        (lambda c, t: t.update({A0: draw(2, 7)}), "A is (2, 7), (2, 6) is needed"),
        (lambda c, t: c.update(base_model_name_or_path="other"), "base model"),
    ],
)  # fmt: skip
def test_unlike_what_was_asked_for(good: Path, tmp_path: Path, change, reason: str) -> None:
    like = read_adapter(good)
    copy = edit(shutil.copytree(good, tmp_path / "copy"), change)
    with pytest.raises(DataError, match=re.escape(reason)):
        read_adapter(copy, like)


def test_other_base_weights_are_refused(good: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(good, tmp_path / "copy")
    save_file(load_file(copy / WEIGHTS), copy / WEIGHTS, {"base_hash": "def"})
    with pytest.raises(DataError, match=r"base weights \(hash\)"):
        merge([good, copy])
    assert merge([good, good]).base_hash == "abc"


def test_merge_arguments(good: Path) -> None:
    for wrong, reason in (
        ({"method": "leggo"}, "did you mean lego"),
        ({"method": "lego", "mas": True}, "did you mean mass"),
        ({"method": "lego", "mass": "yes"}, "must be a bool"),
        ({"method": "fedit", "rank": 3}, "cannot be chosen"),
        ({"method": "flexlora", "rank": "most"}, "must be a number"),
        ({"method": "lego", "rank": 99}, "must be 4 or below"),
        ({"weights": [1.0]}, "weights"),
    ):
        with pytest.raises(ConfigError, match=reason):
            merge([good, good], **wrong)
    with pytest.raises(ConfigError, match="one adapter or more"):
        merge([])


def test_saved_modules_are_averaged(good: Path, tmp_path: Path) -> None:
    name = "base_model.model.score.weight"

    def head(value: float) -> Callable[[dict, dict], Any]:
        return lambda c, t: (c.update(modules_to_save=["score"]),
                             t.update({name: torch.full((2, 6), value)}))  # fmt: skip

    one = edit(shutil.copytree(good, tmp_path / "one"), head(1.0))
    two = edit(shutil.copytree(good, tmp_path / "two"), head(4.0))
    merged = merge([one, two], weights=[2.0, 1.0])
    assert torch.equal(merged.saved["score.weight"], torch.full((2, 6), 2.0))
    path = write_adapter(merged, tmp_path / "merged")
    assert torch.equal(read_adapter(path).saved["score.weight"], merged.saved["score.weight"])
    with pytest.raises(DataError, match=r"missing saved tensor score.weight"):
        merge([one, good])


# ------------------------------------------------------------------------ with peft


def tiny() -> torch.nn.Module:
    """A randomly initialised Llama; the same weights every time."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    with isolated(3):
        return transformers.LlamaForCausalLM(config).eval()


def trained(folder: Path, seed: int, **config: Any) -> Path:
    """An adapter that peft saved, with factors that are not zero."""
    peft = pytest.importorskip("peft")
    with isolated(seed):
        base = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        model = peft.get_peft_model(tiny(), peft.LoraConfig(**{**base, **config}))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path | None) -> torch.Tensor:
    from peft import PeftModel

    model = tiny()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


def shifted(adapter: PeftAdapter) -> torch.Tensor:
    """Logits of the base with the updates added to its weights."""
    model = tiny()
    for name, f in adapter.factors.items():
        model.get_submodule(name).weight.data += f.delta()
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        trained(tmp_path / "A", 1),
        trained(tmp_path / "B", 2, r=2, lora_alpha=3, use_rslora=True),
        trained(tmp_path / "C", 3, rank_pattern={"layers.1.self_attn.q_proj": 6}),
    ]


def test_updates_are_those_of_peft(three: list[Path]) -> None:
    from peft import PeftModel

    for folder in three:
        model = PeftModel.from_pretrained(tiny(), folder)
        for name, f in read_adapter(folder).factors.items():
            theirs = model.base_model.model.get_submodule(name).get_delta_weight("default")
            assert torch.allclose(f.delta(), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lego", {}), ("lego", {"rank": 5}), ("lego", {"rank": "sum", "mass": True}),
        ("lego", {"rank": "energy:0.8"}), ("flora", {}), ("flexlora", {"rank": 3}),
        ("ensemble", {}), ("task_arithmetic", {"coefficient": 0.5}),
        ("ties", {"space": "product"}), ("dare", {"space": "product"}),
    ],
)  # fmt: skip
def test_peft_loads_what_was_merged(
    three: list[Path], tmp_path: Path, method: str, options: dict
) -> None:
    merged = merge(three, method, **options)
    path = write_adapter(merged, tmp_path / "merged")
    theirs = logits(path)
    assert torch.allclose(theirs, shifted(merged), atol=1e-5)
    assert not torch.allclose(theirs, logits(None), atol=1e-2)
    again = read_adapter(path, merged)
    for name, f in merged.factors.items():
        assert torch.equal(again.factors[name].a, f.a)


def test_one_adapter_merges_to_itself(three: list[Path], tmp_path: Path) -> None:
    path = write_adapter(merge(three[2:]), tmp_path / "merged")
    assert torch.allclose(logits(path), logits(three[2]), atol=1e-5)


def test_the_mean_is_exact(three: list[Path]) -> None:
    read = [read_adapter(f) for f in three]
    mean = merge(three, "lego", mass=True, rank="sum", weights=[1, 2, 3]).factors
    exact = flora([r.factors for r in read], [1, 2, 3])
    assert all(torch.allclose(mean[n].delta(), exact[n].delta(), atol=1e-6) for n in exact)


def test_command(three: list[Path], tmp_path: Path) -> None:
    run, out = CliRunner().invoke, str(tmp_path / "merged")
    folders = list(map(str, three))
    done = run(app, ["merge-lora", *folders, "--method", "lego", "--rank", "sum",
                     "--no-output-reweight", "--out", out, "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["modules"] == 4
    assert facts["ranks"] == [10, 12]
    total = sum(a.delta() for a in (read_adapter(f).factors["model.layers.0.self_attn.q_proj"]
                                    for f in three))  # fmt: skip
    merged = read_adapter(out).factors["model.layers.0.self_attn.q_proj"].delta()
    assert torch.allclose(merged, total, atol=1e-5)

    twice = run(app, ["merge-lora", *folders, "--out", out])
    assert (twice.exit_code, "holds an adapter already" in twice.output) == (3, True)
    option = run(app, ["merge-lora", *folders, "--out", f"{out}2", "--option", "gamma_max=1.1",
                       "--weight", "1", "--weight", "2", "--weight", "3"])  # fmt: skip
    assert option.exit_code == 0, option.output
    assert "norms restored" in option.output
    wrong = run(app, ["merge-lora", *folders, "--out", f"{out}3", "--option", "gamma_mix=1"])
    assert (wrong.exit_code, "did you mean gamma_max" in wrong.output) == (2, True)
    same = run(app, ["merge-lora", *[folders[0]] * 2, "--out", f"{out}4"])
    assert "share their start" in same.output
