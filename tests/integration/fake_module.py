# SPDX-License-Identifier: GPL-3.0-or-later
"""What fakes have of an AnsibleModule. Ansible's own would compile its libraries anew in each of the thousands of calls
of playbooks' tests; this is written into each fake in place of its import, with the arguments."""

import json
import sys

ARGUMENTS = r"""<<INCLUDE_ANSIBLE_MODULE_JSON_ARGS>>"""


class Module:
    """Takes every value, of `options` and of no others; those that were not given are None."""

    def __init__(self, options):
        given = json.loads(ARGUMENTS)
        self.check_mode = bool(given.get("_ansible_check_mode"))
        self.params = {name: given.get(name) for name in options}
        unknown = sorted(name for name in given if name not in options and not name.startswith("_ansible_"))
        if unknown:
            self.fail_json(f"Unsupported parameters: {', '.join(unknown)}")

    def exit_json(self, **answer):
        print(json.dumps(answer))
        sys.exit()

    def fail_json(self, msg, **answer):
        print(json.dumps({"failed": True, "msg": msg, **answer}))
        sys.exit(1)
