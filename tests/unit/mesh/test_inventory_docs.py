# SPDX-License-Identifier: GPL-3.0-or-later
"""The generated reference is up to date, and says the same as the model."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from isthmus_mesh.model import ModelError, read_model
from isthmus_mesh.planner import plan
from isthmus_mesh.record import Record
from isthmus_mesh.schema import HOST, HOST_VARIABLES, PLAY_VARIABLES
from unit.mesh.estates import NOW, VERSION, estate, hosts
from unit.mesh.test_model import MESSAGES, Edit

ROOT = Path(__file__).resolve().parents[3]
VARIABLE = re.compile(r"\bisthmus_[a-z0-9_]*[a-z0-9]")
SCHEMA = json.loads((ROOT / "docs" / "inventory.schema.json").read_text())


def inventory(directory: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Estate and hosts of a YAML inventory whose Isthmus variables hold no templates."""
    found: dict[str, dict[str, Any]] = {}

    def walk(group: dict[str, Any] | None, inherited: dict[str, Any]) -> None:
        group = group or {}
        here = {**inherited, **(group.get("vars") or {})}
        for name, variables in (group.get("hosts") or {}).items():
            found[name] = {**here, **(variables or {})}
        for child in (group.get("children") or {}).values():
            walk(child, here)

    for group in yaml.safe_load((directory / "hosts.yml").read_text()).values():
        walk(group, {})
    return yaml.safe_load((directory / "group_vars" / "all.yml").read_text())["isthmus_estate"], found


def test_the_files_are_up_to_date() -> None:
    tool = ROOT / "tests" / "tools" / "generate_inventory_docs.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["lab", "hybrid_example"])
def test_the_inventories_are_planned_and_fit_the_json_schema(name: str) -> None:
    the_estate, the_hosts = inventory(ROOT / "inventories" / name)
    model = read_model(the_estate, the_hosts)
    assert model.warnings == ()
    assert len(plan(model, Record(), NOW, VERSION).specs) == len(the_hosts)
    for variables in the_hosts.values():
        jsonschema.validate({"isthmus_estate": the_estate, **variables}, SCHEMA)


def test_the_example_of_the_page_is_planned() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "inventory.md").read_text(), re.DOTALL)
    the_estate = yaml.safe_load(blocks[0])["isthmus_estate"]
    the_hosts = yaml.safe_load(blocks[1])["all"]["hosts"]
    assert sorted(plan(read_model(the_estate, the_hosts), Record(), NOW, VERSION).specs) == ["n1", "s1"]


def test_the_readmes_own_two_servers_are_planned_and_short() -> None:
    text = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 25
    everything = yaml.safe_load(text)["all"]
    model = read_model(everything["vars"]["isthmus_estate"], everything["hosts"])
    made = plan(model, Record(), NOW, VERSION)
    assert sorted(made.specs) == ["alpha", "beta"]
    assert [service["name"] for service in made.services["dc"]["present"]] == ["web"]
    assert made.services["dc"] == made.services["burst"]


def test_every_variable_is_on_the_page() -> None:
    page = (ROOT / "docs" / "inventory.md").read_text()
    assert all(f"`{name}`" in page for name in (*HOST_VARIABLES, *PLAY_VARIABLES))


def texts(value: Any) -> Iterator[str]:
    """All texts of a YAML document, those of keys and templates too."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from texts(key)
            yield from texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from texts(entry)
    elif isinstance(value, str):
        yield value


def code_texts(path: Path) -> Iterator[str]:
    """Texts in a plugin's code, without Ansible's documentation blocks."""
    tree = ast.parse(path.read_text())
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if any(isinstance(one, ast.Name) and one.id in ("DOCUMENTATION", "EXAMPLES", "RETURN") for one in targets):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_variables_are_those_that_the_collection_reads() -> None:
    used: set[str] = set()
    own: set[str] = set()  # of the playbooks, for the roles
    for path in [*ROOT.glob("playbooks/**/*.yml"), *ROOT.glob("roles/*/*/*.yml")]:
        if path.parent.name == "meta":
            continue
        document = yaml.safe_load(path.read_text())
        used |= {name for text in texts(document) for name in VARIABLE.findall(text)}
        if path.parent.name == "playbooks":
            own |= {name for play in document if "hosts" in play for name in play.get("vars", {})}
    for path in ROOT.glob("plugins/**/*.py"):
        if path.name != "schema.py":
            used |= {name for text in code_texts(path) for name in VARIABLE.findall(text)}
    packages = {path.name for path in (ROOT / "agent").iterdir()}
    assert used - own - packages == {*HOST.keys, *PLAY_VARIABLES, "isthmus_estate"}


FORM = [
    entry
    for entry in MESSAGES
    if "is not a key of" in entry[2] or "is missing. Why: Range" in entry[2] or "is not text" in entry[2]
]


@pytest.mark.parametrize("edit", [entry[1] for entry in FORM], ids=[entry[0] for entry in FORM])
def test_the_json_schema_refuses_what_the_model_refuses_for_its_form(edit: Edit) -> None:
    the_estate, the_hosts = estate(), hosts()
    for variables in the_hosts.values():
        jsonschema.validate({"isthmus_estate": the_estate, **variables}, SCHEMA)
    edit(the_estate, the_hosts)
    with pytest.raises(ModelError):
        read_model(the_estate, the_hosts)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert any(not validator.is_valid({"isthmus_estate": the_estate, **variables}) for variables in the_hosts.values())
