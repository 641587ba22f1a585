# SPDX-License-Identifier: GPL-3.0-or-later
"""The datapath's programs and maps: libbpf by ctypes, the map ABI, and the applier that fills the maps."""
