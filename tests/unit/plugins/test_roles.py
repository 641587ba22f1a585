# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles say of themselves what is true: defaults, argument specs and README name the same variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROLES = Path(__file__).resolve().parents[3] / "roles"
NAMES = sorted(path.name for path in ROLES.iterdir() if (path / "meta").is_dir())


@pytest.mark.parametrize("role", NAMES)
def test_variables_agree(role: str) -> None:
    defaults = ROLES / role / "defaults" / "main.yml"
    values = (yaml.safe_load(defaults.read_text()) if defaults.exists() else None) or {}
    options = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"][
        "options"
    ]
    assert set(values) == set(options)
    readme = (ROLES / role / "README.md").read_text()
    if "meta/argument_specs.yml" not in readme:
        assert [name for name in options if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("role", NAMES)
def test_variables_have_the_roles_prefix(role: str) -> None:
    options = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"][
        "options"
    ]
    assert [name for name in options if not name.startswith(role + "_")] == []
