# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules that talk to a cloud provider's API have in common."""

from __future__ import annotations


class ModuleDocFragment:
    """Provider, owner, credentials."""

    DOCUMENTATION = r"""
options:
  provider:
    description: Whose network it is.
    type: str
    choices: [aws, google, azure]
    required: true
  state:
    description: V(absent) removes everything that O(owner) has there, and nothing else.
    type: str
    choices: [present, absent]
    default: present
  owner:
    description:
      - Name under which everything is made, and by which it is known again. Lower-case letters, digits and C(-), at
        most 24. Two of one network must have different names; the estate's name and the site's make a good one.
    type: str
    required: true
  endpoint:
    description:
      - Base URL of the provider's API, for private endpoints and sovereign clouds. For Google it holds C({service}),
        which stands for the API's name (C(compute), C(cloudresourcemanager)).
      - For AWS C(AWS_ENDPOINT_URL) of the environment works as well.
    type: str
requirements:
  - boto3, for AWS
  - google-api-python-client >= 2.100, for Google
  - azure-mgmt-network >= 33.1 and azure-identity, for Azure
attributes:
  check_mode:
    support: full
    description: Predicts exactly what the run would change, and names permissions that it would lack.
  diff_mode:
    support: full
    description: Shows before and after of every change.
  platform:
    platforms: posix
    support: full
    description: Runs on the controller; no host of the mesh needs credentials of a provider.
notes:
  - Run it on the controller (C(hosts=localhost), or C(delegate_to=localhost)). Credentials come from where the
    provider's own tools take them - environment, profile, instance role; AWX's credential types set the environment.
    No option takes a secret, so none is in an inventory, a log or on a host.
  - Throttled calls are made again, ever more slowly.
  - Permissions, quotas and what was not tried on the real cloud are in the collection's C(docs/vpc_aws.md),
    C(docs/vpc_google.md) and C(docs/vpc_azure.md).
"""
