"""Resource limits, by name."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Mapping
from typing import Final

from mcp_broker import limits
from mcp_broker.confine import kernel

#: name -> number; what this system knows
NAMES: Final[Mapping[str, int]] = {
    name.removeprefix("RLIMIT_").lower(): getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}


def raise_files() -> None:
    """Let this process, and what it starts, hold as many descriptors as it may, up to a bound.

    The usual soft limit, 1024, is for programs that use select(). Some close descriptors one by one up to their limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = limits.DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, limits.DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def limit(values: Mapping[str, int]) -> None:
    """Set soft and hard limits of this process; a value above what it may have becomes that.

    Raises:
        kernel.Refused: there is no such limit (EINVAL), or it cannot be set.
    """
    for name, value in values.items():
        number = NAMES.get(name)
        if number is None:
            raise kernel.Refused(errno.EINVAL, f"setrlimit {name}")
        _, hard = resource.getrlimit(number)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)  # noqa: PLW2901 (without CAP_SYS_RESOURCE nobody goes above it)
        try:
            resource.setrlimit(number, (value, value))
        except (OSError, ValueError) as error:
            raise kernel.Refused(getattr(error, "errno", None) or errno.EPERM, f"setrlimit {name}") from error
