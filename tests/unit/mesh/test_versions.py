# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of versions, and which of them may be applied to an estate."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
from isthmus_mesh import versions
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import plan
from isthmus_mesh.record import Record, merge
from isthmus_mesh.refusals import refuse_other_version
from unit.mesh.estates import NOW, VERSION, model, planned

# Section 11 of Semantic Versioning 2.0.0, and numbers that text would order wrongly.
ASCENDING = (
    *("0.9.10", "1.0.0-0", "1.0.0-2", "1.0.0-10", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta"),
    *(
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "1.0.1-dev",
        "1.0.2",
        "1.0.10",
        "1.2.0",
        "1.10.0",
        "2.0.0",
    ),
)


def test_order() -> None:
    for lower, higher in itertools.combinations(ASCENDING, 2):
        assert versions.order(lower) < versions.order(higher), (lower, higher)
    assert versions.order("1.0.0-rc.1+a") == versions.order("1.0.0-rc.1+b.7")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "1",
            "1.0",
            "1.0.0.0",
            "v1.0.0",
            "01.0.0",
            "1.0.0-",
            "1.0.0-01",
            "1.0.0-a..b",
            "1.0.0+",
            "1.0.0 ",
            "latest",
        ),
        *("1.0.0\n", "1.٣.0", "1.0.0; echo", "-1.0.0"),
    ],
)
def test_what_is_no_version(text: str) -> None:
    assert not versions.valid(text)
    with pytest.raises(versions.VersionError, match="is not a version such as"):
        versions.order(text)


def record(running: str | None) -> Record:
    """A running estate's, which holds this version; of before versions were recorded when it is None."""
    documents = dict(planned(model()).record)
    documents["roster"] = {key: value for key, value in documents["roster"].items() if key != "version"}
    if running is not None:
        documents["roster"]["version"] = running
    return merge([documents])


@pytest.mark.parametrize(
    ("running", "installed", "wanted"),
    [
        ("1.0.0", "1.0.0", None),
        ("1.0.0", "1.0.0", "1.0.0"),
        ("1.0.0", "1.1.0", "1.1.0"),
        ("1.0.0-rc.1", "1.0.0", "1.0.0"),
        ("1.0.0+local", "1.0.0", None),
        (None, "1.1.0", None),
        (None, "1.1.0", "1.1.0"),
    ],
)
def test_what_may_be_applied(running: str | None, installed: str, wanted: str | None) -> None:
    refuse_other_version(record(running), installed, wanted)


def test_a_new_estate_takes_any_version() -> None:
    refuse_other_version(Record(), "0.0.1")
    refuse_other_version(Record(), "0.0.1", "0.0.1")


INSTALL = "`ansible-galaxy collection install isthmus.mesh:=="
DOWNGRADE = "a downgrade is never made: what a newer version wrote, an older one may misread"
PINNED = "Why: `site` installs the agent of its own version"


@pytest.mark.parametrize(
    ("running", "installed", "wanted", "words"),
    [
        (
            *("1.1.0", "1.0.0", None),
            "isthmus.mesh: 1.0.0 is older than 1.1.0, which was applied to this estate last. Why: "
            f"{DOWNGRADE}. Next: {INSTALL}1.1.0`, and run again.",
        ),
        (
            *("1.0.0", "1.0.0-rc.1", None),
            "isthmus.mesh: 1.0.0-rc.1 is older than 1.0.0, which was applied to this estate last. Why: "
            f"{DOWNGRADE}. Next: {INSTALL}1.0.0`, and run again.",
        ),
        (
            *("1.1.0", "1.0.0", "1.0.0"),
            "isthmus_version: 1.0.0 is older than 1.1.0, which was applied to this estate last. Why: "
            f"{DOWNGRADE}. Next: set isthmus_version to 1.1.0, or leave it out; {INSTALL}1.1.0`, and run again.",
        ),
        (
            *("1.1.0", "1.1.0", "1.0.0"),
            "isthmus_version: 1.0.0 is older than 1.1.0, which was applied to this estate last. Why: "
            f"{DOWNGRADE}. Next: set isthmus_version to 1.1.0, or leave it out.",
        ),
        (
            *("1.0.0", "1.1.0", None),
            "isthmus.mesh: 1.1.0 is newer than 1.0.0, which was applied to this estate last. Why: a running estate is "
            "upgraded only when that is asked for. Next: to upgrade it, `ansible-playbook isthmus.mesh.site -e "
            f"isthmus_version=1.1.0`; to stay, {INSTALL}1.0.0`.",
        ),
        (
            *("1.0.0", "1.1.0", "1.0.0"),
            f"isthmus_version: 1.0.0 is wanted, and the controller has isthmus.mesh 1.1.0. {PINNED}. Next: "
            f"{INSTALL}1.0.0`, and run again.",
        ),
        (
            *("1.0.0", "1.0.0", "1.1.0"),
            f"isthmus_version: 1.1.0 is wanted, and the controller has isthmus.mesh 1.0.0. {PINNED}. Next: "
            f"{INSTALL}1.1.0`, and run again.",
        ),
        (
            *("1.0.0", "1.0.0", "latest"),
            "isthmus_version: 'latest' is not a version such as 1.2.3. Why: it names the one version that `site` may "
            "install. Next: write 1.0.0, or the version that is meant.",
        ),
    ],
)
def test_what_must_not_be_applied(running: str, installed: str, wanted: str | None, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        refuse_other_version(record(running), installed, wanted)
    assert [str(problem) for problem in caught.value.problems] == [words]
    assert "Nothing was changed on any host." in str(caught.value)


@pytest.mark.parametrize("known", [Record(), record(None)], ids=["new", "of before versions were recorded"])
def test_a_pin_is_kept_whatever_runs(known: Record) -> None:
    with pytest.raises(ModelError, match=r"1\.0\.0 is wanted, and the controller has isthmus\.mesh 1\.1\.0"):
        refuse_other_version(known, "1.1.0", "1.0.0")


@pytest.mark.parametrize(("running", "was"), [(None, "of an unknown version"), ("0.9.0", "0.9.0")])
def test_the_roster_alone_takes_the_new_version_and_keeps_it(running: str | None, was: str) -> None:
    before = record(running)
    after = plan(model(), before, NOW + timedelta(hours=1), VERSION, "bob")
    assert after.record["roster"] == {
        **before.to_documents()["roster"],
        "version": VERSION,
        "revision": 2,
        "when": "2026-01-02T04:04:05Z",
        "by": "bob",
    }
    clusters = [name for name in after.record if name != "roster"]
    assert [after.record[name] for name in clusters] == [before.to_documents()[name] for name in clusters]
    (change,) = after.changes
    assert f"applied by isthmus.mesh {VERSION} (was " in change
    assert change.endswith(f"applied by isthmus.mesh {was})")
    assert after.specs == planned(model()).specs
    again = plan(model(), merge([dict(after.record)]), NOW + timedelta(hours=2), VERSION, "carol")
    assert (again.record, again.changes) == (after.record, ())
