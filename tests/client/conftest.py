from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.support.broker import ScriptedBroker


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as serving:
        yield serving
