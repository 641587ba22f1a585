# SPDX-License-Identifier: GPL-3.0-or-later
"""What strongSwan's own answers say of a tunnel. They are of strongSwan 5.9.8."""

from __future__ import annotations

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import strongswan
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec

SAS = """\
isthmus-cloud: #1, ESTABLISHED, IKEv2, 6fc8cad4fa3dd771_i 68a0fe899f38d738_r*
  local  'isthmus-ipsec-o1' @ 198.18.1.1[4500]
  remote 'isthmus-ipsec-c1' @ 198.18.2.1[4500]
  AES_GCM_16-256/PRF_HMAC_SHA2_384/ECP_384
  established 12s ago, rekeying in 12955s
  net: #1, reqid 1, INSTALLED, TUNNEL-in-UDP, ESP:AES_GCM_16-256
    installed 12s ago, rekeying in 3313s, expires in 3948s
    local  198.18.1.0/24
    remote 198.18.2.0/24
isthmus-edge: #4, ESTABLISHED, IKEv2, 2d3560e7ed90a17d_i* 02c2c67b897ce6d5_r
  local  'isthmus-ipsec-o1' @ 198.18.1.1[4500]
isthmus-cloud: #6, ESTABLISHED, IKEv2, 7c560e7ed90a17d1_i 12c02c67b897ce6d_r*
  local  'isthmus-ipsec-o1' @ 198.18.1.1[4500]
  remote 'isthmus-ipsec-c1' @ 198.18.2.1[4500]
  AES_GCM_16-256/PRF_HMAC_SHA2_384/ECP_384
  established 1s ago, rekeying in 12955s
isthmus-hall: #5, CONNECTING, IKEv2, 2d3560e7ed90a17e_i* 0000000000000000_r
  net: #5, reqid 5, CREATED, TUNNEL
"""
CONNECTIONS = """\
isthmus-cloud: IKEv2, no reauthentication, rekeying every 14400s, dpd delay 2s
  local:  198.18.1.1
  net: TUNNEL, rekeying every 3600s
office: IKEv1, rekeying every 14400s
"""


def test_a_tunnel_is_there_when_its_child_is() -> None:
    assert strongswan.established(SAS) == {"isthmus-cloud": {"net"}, "isthmus-edge": set()}
    assert strongswan.loaded(CONNECTIONS) == {"isthmus-cloud", "office"}
    assert [strongswan.age(SAS, f"isthmus-{name}") for name in ("cloud", "hall", "clou")] == [12, None, None]
    assert [strongswan.connecting(SAS, f"isthmus-{name}") for name in ("cloud", "hall")] == [[], ["5"]]
    assert [strongswan.numbers(SAS, f"isthmus-{name}") for name in ("cloud", "hall", "clou")] == [["1"], [], []]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("12[IKE] received NO_PROPOSAL_CHOSEN notify error", "the two sides agree on no proposal"),
        ("05[IKE] received AUTHENTICATION_FAILED notify error", "authentication failed"),
        ("05[IKE] tried 1 shared key for 'a' - 'b', but MAC mismatched", "authentication failed"),
        ("05[IKE] received TS_UNACCEPTABLE notify, no CHILD_SA built", "the two sides name other networks"),
        ("16[IKE] giving up after 3 retransmits", "the other gateway does not answer"),
        ("13[NET] received packet: from 198.18.1.1[4500]", ""),
    ],
)
def test_the_last_known_word_counts(line: str, words: str) -> None:
    told = strongswan.why(f"13[IKE] something else\n{line}\n13[ENC] parsed")
    assert told.startswith(words)
    assert bool(told) is bool(words)
    quoted = f"{told} (strongSwan: {line.partition('] ')[2]})" if words else ""
    assert strongswan.quoted(f"{line}\n13[ENC] parsed") == quoted


def test_rules_are_compared_as_nft_prints_them() -> None:
    written = "chain leaves {\n  ip daddr { 198.18.2.1 } udp sport { 500, 4500 } accept\n  policy accept;\n}"
    printed = "\t\tip daddr 198.18.2.1 udp sport { 500, 4500 } accept\n\t}"
    assert strongswan.guard_rules(written) == strongswan.guard_rules(printed) != []
    assert strongswan.guard_rules("\t\trt ipsec 1 accept") == [ipsec.ENCRYPTED], "a number, as -n asks for"
