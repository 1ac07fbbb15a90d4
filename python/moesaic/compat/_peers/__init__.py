# SPDX-License-Identifier: Apache-2.0
"""Behind `python -m moesaic.compat.run_peer_tests`: the original projects' own tests on our modules."""
