"""Names of components: where they lead, and what is said when they lead nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import registry
from fedsim.config import parse
from fedsim.config.components import mistakes, parameters
from fedsim.config.models import StrategyConfig
from fedsim.core.errors import ConfigError

ROOT = Path(__file__).parent.parent
EVERY = [(kind, name) for kind in registry.SINGULAR for name in registry.names(kind)]

PLUGIN = """
from dataclasses import dataclass
from fedsim.core.program import LocalProgram
from strategies.fedavg import FedAvg

class Mine(FedAvg):
    '''My own strategy.

    More words.
    '''

    def __init__(self, speed: float, *, sizes: tuple[int, ...] = (1,), **more) -> None:
        super().__init__(**more)

class NotOne:
    pass

def anything(seed, **more):
    return None

number = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with entry points, as pip would have installed it."""
    files = {
        "my_plugin.py": PLUGIN,
        "broken_plugin.py": "raise RuntimeError('no\\nluck')",
        "quitting_plugin.py": "raise SystemExit(3)",
        "my_plugin-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-plugin\n",
        "my_plugin-1.0.dist-info/entry_points.txt": (
            "[fedsim.strategies]\nmine = my_plugin:Mine\nbroken = broken_plugin:Mine\n"
            "quitting = quitting_plugin:Mine\nfedavg = my_plugin:NotOne\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._plugins.cache_clear()
    yield tmp_path
    registry._plugins.cache_clear()
    for name in ("my_plugin", "broken_plugin", "quitting_plugin"):
        sys.modules.pop(name, None)


def problem(kind: str, name: str) -> str:
    """What is said of a name that leads nowhere."""
    with pytest.raises(ConfigError) as caught:
        registry.resolve(kind, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------- built in


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_builtin_component_is_there_and_described(kind: str, name: str) -> None:
    component = registry.resolve(kind, name)
    assert callable(component)
    line = registry.describe(kind, name)
    assert line.endswith((".", ":")), line
    assert line in component.__doc__


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_which_builtin_components_need_parameters(kind: str, name: str) -> None:
    """`plain` spares the import of what can be made by its name alone."""
    if kind == "clients":
        return
    missing = [key for key, _ in mistakes(kind, registry.resolve(kind, name), {})]
    assert registry.plain(kind, name) == (not missing)


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_no_parameter_of_a_strategy_hides_a_key_of_its_table(name: str) -> None:
    known, anything = parameters("strategies", registry.resolve("strategies", name))
    assert not anything
    assert not set(known) & set(StrategyConfig.model_fields)


def test_listing_and_describing_imports_nothing_heavy() -> None:
    program = """import sys
from fedsim import registry
for kind in registry.SINGULAR:
    for name in registry.names(kind):
        registry.describe(kind, name)
print(sorted({"torch", "flwr", "numpy", "pydantic"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_nothing_in_fedsim_names_an_algorithm() -> None:
    """Strategies and clients are known as strings, here and nowhere else."""
    for file in (ROOT / "fedsim").rglob("*.py"):
        if file.name == "registry.py":
            continue
        text = file.read_text(encoding="utf-8")
        assert "strategies.fed" not in text, file
        assert "clients.fed" not in text, file


# ------------------------------------------------------------------------------- plug-ins


@pytest.mark.usefixtures("plugin")
def test_a_plugin_is_found_listed_described_and_checked() -> None:
    assert registry.names("strategies")[-3:] == ["broken", "mine", "quitting"]
    assert registry.locate("strategies", "mine") == "my_plugin:Mine"
    assert registry.describe("strategies", "mine") == "My own strategy."
    assert registry.resolve("strategies", "mine").__name__ == "Mine"
    known, anything = parameters("strategies", registry.resolve("strategies", "mine"))
    assert sorted(known) == ["server_lr", "sizes", "speed", "weighted"]
    assert not anything


@pytest.mark.usefixtures("plugin")
def test_a_plugin_cannot_take_a_builtin_name() -> None:
    assert registry.locate("strategies", "fedavg") == "strategies.fedavg:FedAvg"
    assert registry.names("strategies").count("fedavg") == 1


@pytest.mark.usefixtures("plugin")
def test_a_broken_plugin_gives_one_clear_line() -> None:
    assert problem("strategies", "broken") == (
        'strategy "broken": broken_plugin fails on import: RuntimeError: no\\nluck'
    )
    assert "quitting_plugin fails on import: SystemExit: 3" in problem("strategies", "quitting")
    assert registry.describe("strategies", "broken") == ""


@pytest.mark.usefixtures("plugin")
def test_parameters_of_a_plugin_are_checked_with_the_rest() -> None:
    tables = {
        "experiment": {"name": "x"},
        "data": {"dataset": "digits"},
        "model": "mlp",
        "strategy": [{"name": "mine", "sizes": [1, "2"], "server_lr": -1, "sped": 1}],
    }
    with pytest.raises(ConfigError) as caught:
        parse(tables, "f")
    assert [str(f) for f in caught.value.faults] == [
        'f: strategy.mine.sizes = [1, "2"]: must be a whole number',
        "f: strategy.mine.sped = 1: unknown parameter of Mine; did you mean speed? (allowed: "
        "speed, sizes, server_lr, weighted, client, label, model, pooled, train, tune)",
        "f: strategy.mine.speed: is required by Mine",
    ]
    tables["strategy"] = [{"name": "mine", "sizes": [1, 2], "speed": 1}]
    assert parse(tables).strategy[0].params == {"sizes": [1, 2], "speed": 1}
    tables["strategy"] = [{"name": "mine", "speed": 1, "server_lr": -1}]
    with pytest.raises(ConfigError, match=r"strategy\.mine\.server_lr = -1: must be above 0"):
        parse(tables)


# ------------------------------------------------------------------------------- leading nowhere


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (
            "strategies",
            "fedvag",
            'strategy "fedvag": unknown strategy; did you mean fedavg? (known: ',
        ),
        ("datasets", "minst5k", 'dataset "minst5k": unknown dataset; did you mean mnist5k?'),
        ("models", "transformer", 'model "transformer": unknown model (known: logistic, mlp,'),
        ("partitioners", "Dirichlet ", "unknown partitioner; did you mean dirichlet?"),
        ("devices", "telephone", "unknown device; did you mean phone?"),
        ("clients", "", 'client half "": unknown client half (known: fedavg'),
        ("strategies", "a b:c", 'strategy "a b:c": must be a name or package.module:attribute'),
        ("strategies", "../x:y", "must be a name or package.module:attribute"),
        ("strategies", "my_plugin:", "must be a name or package.module:attribute"),
        (
            "strategies",
            "no_such:X",
            "there is no module no_such; it is looked for on the Python path",
        ),
        ("strategies", "my_plugin.sub:X", "there is no module my_plugin.sub"),
        ("strategies", "my_plugin:Min", "my_plugin has no Min; did you mean Mine?"),
        ("strategies", "my_plugin:NotOne", "my_plugin:NotOne is no strategy: it has no configure_"),
        ("strategies", "my_plugin:number", "is no strategy: it has no configure_train"),
        ("clients", "my_plugin:Mine", "my_plugin:Mine is no client half: it has no init"),
        ("models", "my_plugin:number", "my_plugin:number is no model: it has no call"),
    ],
)
def test_a_name_that_leads_nowhere(kind: str, name: str, words: str) -> None:
    assert words in problem(kind, name)


@pytest.mark.usefixtures("plugin")
def test_a_component_that_takes_anything_is_given_anything() -> None:
    anything = registry.resolve("datasets", "my_plugin:anything")
    assert list(mistakes("datasets", anything, {"x": 1, "y": [1]})) == []
    (found,) = mistakes("datasets", anything, {"seed": 1})
    assert found == ("seed", "unknown parameter of anything (allowed: none)")
