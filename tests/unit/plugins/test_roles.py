# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles say of themselves what is true: defaults, argument specs and README name the same variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).resolve().parents[3] / "roles"
NAMES = sorted(path.name for path in ROLES.iterdir() if (path / "meta").is_dir())


def options_of(role: str) -> dict[str, Any]:
    spec = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())
    options: dict[str, Any] = spec["argument_specs"]["main"]["options"]
    return options


@pytest.mark.parametrize("role", NAMES)
def test_variables_agree(role: str) -> None:
    defaults = ROLES / role / "defaults" / "main.yml"
    values = (yaml.safe_load(defaults.read_text()) if defaults.exists() else None) or {}
    options = options_of(role)
    assert set(values) == set(options)
    # A default that is an expression is told in words: as a value it would not be of the option's type.
    literal = {name: value for name, value in values.items() if "{{" not in str(value)}
    assert {name: option["default"] for name, option in options.items() if "default" in option} == literal
    readme = (ROLES / role / "README.md").read_text()
    if "meta/argument_specs.yml" not in readme:
        assert [name for name in options if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("role", NAMES)
def test_variables_have_the_roles_prefix(role: str) -> None:
    assert [name for name in options_of(role) if not name.startswith(role + "_")] == []


def test_no_role_needs_pythons_bindings_of_a_package_manager() -> None:
    """ansible.builtin.package and apt ask a bare host for python3-apt, in check mode in vain."""
    needing = ("ansible.builtin.package", "ansible.builtin.apt", "ansible.builtin.dnf")
    texts = {path: path.read_text() for path in ROLES.glob("*/tasks/*.yml")}
    assert [str(path) for path, text in texts.items() if any(f"{name}:" in text for name in needing)] == []
