# SPDX-License-Identifier: GPL-3.0-or-later
"""The story of the demo, sentence by sentence, and what a run of `site` costs."""

from __future__ import annotations

import pytest
from demo import Story
from isthmus_lab import Lab
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab]


def test_site_on_a_converged_estate_changes_nothing_and_is_small(mesh: Lab) -> None:
    run = play("site")
    assert set(run.hosts) == set(mesh.hosts)
    assert run.changed == {}
    assert {name: recap.ok for name, recap in run.hosts.items() if recap.ok > 10} == {}


def test_check_on_a_converged_estate_predicts_nothing(mesh: Lab) -> None:
    assert play("site", "--check", "--diff").changed == {}


@pytest.mark.parametrize("step", Story.STEPS)
def test_story(mesh: Lab, step: str) -> None:
    story = Story(mesh, print)
    story.everywhere(story.backends)
    findings = list(getattr(story, step)())
    assert findings
    assert [f"{finding.sentence}: {finding.measured}" for finding in findings if not finding.true] == []
