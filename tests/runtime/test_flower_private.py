"""Every private part of Flower that we use, one test each: its name says what has moved.

If one fails after an upgrade of flwr, mend the file it names; for messages and grids that is
`fedsim/runtime/flower.py` and nothing else.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict

import fedsim
from fedsim.runtime import flower

ROOT = Path(fedsim.__file__).parent.parent
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
KNOWN = {
    "fedsim/runtime/flower.py",  # messages and grids
    "fedsim/runtime/simulation.py",  # the simulation engine's faults
    "fedsim/deploy/fleet.py",  # a device that signs off
}


def message() -> Message:
    flower.become_server()
    return Message(RecordDict(), dst_node_id=7, message_type="train")


def test_task_identity_lets_a_process_build_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError):
        Message(RecordDict(), dst_node_id=7, message_type="train")
    flower.become_server(3)
    made = Message(RecordDict(), dst_node_id=7, message_type="train")
    assert (made.metadata.run_id, made.metadata.src_node_id) == (3, 1)
    flower.become_server(4)  # whoever was first stays
    assert message().metadata.run_id == 3


def test_metadata_message_id_can_be_set_and_replies_refer_to_it() -> None:
    made = message()
    flower.set_message_id(made, "m12")
    assert made.metadata.message_id == "m12"
    reply = Message(RecordDict(), reply_to=made)
    assert reply.metadata.reply_to_message_id == "m12"
    assert reply.metadata.src_node_id == 7


def test_metadata_source_can_be_set() -> None:
    made = message()
    flower.set_source(made, 9)
    assert made.metadata.src_node_id == 9


def test_run_can_be_made_empty() -> None:
    assert flower.empty_run(5).run_id == 5
    assert isinstance(flower.empty_run(5), flower.Run)


def test_error_codes_are_the_numbers_we_wrote_down() -> None:
    from flwr.common.constant import ErrorCode

    assert flower.CLIENT_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert flower.NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    assert Message(Error(flower.CLIENT_RAISED, "x"), reply_to=message()).has_error()


def private_imports() -> list[tuple[str, str, str]]:
    """File, module and name of everything of Flower that we import and that is not public."""
    found = []
    for folder in ("fedsim", "strategies", "clients"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr."):
                    names = [(node.module or "", a.name) for a in node.names]
                elif isinstance(node, ast.Import):
                    names = [(a.name, "") for a in node.names if a.name.startswith("flwr")]
                else:
                    continue
                file = str(path.relative_to(ROOT))
                found += [(file, m, n) for m, n in names if not m.startswith(PUBLIC)]
    return found


@pytest.mark.parametrize(("file", "module", "name"), private_imports())
def test_what_we_import_is_where_it_was(file: str, module: str, name: str) -> None:
    if "ray" in module:
        pytest.importorskip("ray")
    assert hasattr(importlib.import_module(module), name), f"{file} needs {module}.{name}"


def test_private_parts_are_used_in_few_files() -> None:
    assert {file for file, _, _ in private_imports()} <= KNOWN
