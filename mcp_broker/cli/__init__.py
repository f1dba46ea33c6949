"""The command line: one module a command group, each loaded when its command runs.

Exit codes, which scripts rely on: 0 done; 1 the tool or the operation failed; 2 command line syntax; 3 refused;
4 not reachable, or no profile; 5 deadline; 130 interrupted. :mod:`mcp_broker.cli.failures` is the one place that chooses.

Output: results on standard output, messages on standard error. With ``--json`` standard output holds exactly one JSON
document: the result, or ``{"error": {"code", "message", "hint", "retryable", "details"}}`` when there is none
(``call --stream`` prints one document a line). The message for people goes to standard error either way.
"""

from __future__ import annotations

from mcp_broker.cli.root import main

__all__ = ["main"]
