"""Taking back what a dead worker leaves: see :mod:`.steps` for the list, docs/reclaim.md for what is promised."""

from mcp_broker.supervisor.reclaim.folders import remove_tree
from mcp_broker.supervisor.reclaim.history import Reclaims
from mcp_broker.supervisor.reclaim.leftovers import (
    INSTANCE_VARIABLE,
    forget,
    record,
    record_groups,
    remove_leftovers,
)
from mcp_broker.supervisor.reclaim.memory import prefix
from mcp_broker.supervisor.reclaim.reclaimer import Reclaimer
from mcp_broker.supervisor.reclaim.steps import Remains
from mcp_broker.supervisor.reclaim.strays import Swept, become_subreaper, sweep

__all__ = [
    "INSTANCE_VARIABLE",
    "Reclaimer",
    "Reclaims",
    "Remains",
    "Swept",
    "become_subreaper",
    "forget",
    "prefix",
    "record",
    "record_groups",
    "remove_leftovers",
    "remove_tree",
    "sweep",
]
