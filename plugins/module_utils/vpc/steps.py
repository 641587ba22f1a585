# SPDX-License-Identifier: BSD-2-Clause
"""What a plan for a VPC does, step by step: shown, rehearsed, then done until one fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
    from ansible_collections.isthmus.mesh.plugins.module_utils.vpc.plan import Wish


class ProviderError(Exception):
    """The provider refused `call`; `permission` is set when it did so for want of one, `gone` when it does not know
    the network."""

    def __init__(self, call: str, message: str, permission: str = "", gone: bool = False) -> None:
        super().__init__(f"{call}: {message}")
        self.call = call
        self.message = message
        self.permission = permission
        self.gone = gone


@dataclass
class Step:
    """One call that changes something. `rehearse` raises `ProviderError` when the call would be refused; once is enough
    for one permission on one thing, `where`."""

    what: str
    before: str
    after: str
    do: Callable[[], Any]
    permission: str
    rehearse: Callable[[], Any] | None = None
    where: str = ""


@dataclass
class Plan:
    """Steps in their order, what forbids them, what is worth telling, and what the module returns."""

    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    missing: Callable[[list[str]], dict[str, str]] = lambda permissions: {}
    """Of the steps' permissions those that the run lacks, each with what the provider says of it."""

    def lost(self, wish: Wish, nobody: str, known: bool) -> None:
        """The host of a route is nowhere, says `nobody`: a `known` route waits for it, a new one is a mistake."""
        text = f"{nobody} has the address {wish.hop}, to which {wish.destination} leads"
        if known:
            self.warnings.append(f"{text} (the host is gone); the route stays as it is.")
        else:
            self.problems.append(f"{text}. Next: correct the address, or start the host.")

    def without(self, hosts: Iterable[str], here: Container[str], nobody: str, wishes: Iterable[Wish]) -> None:
        """Tells of `hosts` that are not `here`, and that no routes lead to (for those there is `lost`). One that is
        gone has nothing to open and is no reason to leave the others closed; when all are, the network is another."""
        hosts = list(hosts)
        led = {wish.hop.address for wish in wishes}
        gone = [f"{nobody} has the address {host}" for host in hosts if host not in here and host not in led]
        if any(host in here for host in hosts):
            self.warnings += [f"{text} (the host is gone); nothing is opened on it." for text in gone]
        else:
            self.problems += [f"{text}. Next: correct hosts, or start the host." for text in gone]

    def gone(self, exc: ProviderError) -> None:
        """Tells of a network that is no more, as `exc` says, when what is in it is to go."""
        self.warnings.append(f"there is no such network any more, so nothing was looked for in it: {exc}")


def refused(permissions: dict[str, str]) -> str:
    """The words for permissions (name -> what the provider says) that are missing."""
    named = "; ".join(f"{name} ({said})" if said else name for name, said in sorted(permissions.items()))
    return (
        f"permission missing: {named}. Grant it to the credentials of this run (the page of its "
        "provider, docs/vpc_*.md, lists all) and run again."
    )


def carry_out(module: AnsibleModule, changes: Changes, plan: Plan) -> None:
    """Find out whether every step is permitted, then do and show them; fails the module with words.

    Nothing is changed unless everything is permitted, as far as the provider can be asked.
    """
    for text in plan.warnings:
        module.warn(text)
    if plan.problems:
        words = " ".join(f"({number}) {problem}" for number, problem in enumerate(plan.problems, 1))
        module.fail_json(msg=f"nothing was changed. {words}", **plan.result)
    missing = plan.missing(sorted({step.permission for step in plan.steps})) if plan.steps else {}
    rehearsals = {(step.permission, step.where): step for step in plan.steps if step.rehearse is not None}
    for step in rehearsals.values():
        if step.rehearse is not None and step.permission not in missing:
            try:
                step.rehearse()
            except ProviderError as exc:
                if not exc.permission:
                    module.fail_json(
                        msg=f"nothing was changed. {step.what}: the provider would refuse it: {exc}", **plan.result
                    )
                missing[exc.permission] = f"call {exc.call}, for {step.what}: {exc.message}"
    if missing:
        module.fail_json(msg=f"nothing was changed; {refused(missing)}", **plan.result)
    for number, step in enumerate(plan.steps):
        if not module.check_mode:
            try:
                step.do()
            except ProviderError as exc:
                said = refused({exc.permission: f"call {exc}"}) if exc.permission else f"{str(exc).rstrip('.')}."
                done = [one.what for one in plan.steps[:number]]
                left = [one.what for one in plan.steps[number:]]
                stays = f"{len(done)} changes before it stay and are known as ours" if done else "nothing was changed"
                module.fail_json(
                    msg=f"{step.what} failed; {stays}, {len(left) - 1} after it were not tried. {said} Next: solve that"
                    " and run again; the rest is done then.",
                    changed=changes.changed,
                    diff=changes.diff,
                    done=done,
                    not_done=left,
                    **plan.result,
                )
        changes.note(step.what, step.before, step.after)
