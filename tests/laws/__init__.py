"""What holds for every method, on every engine. The numbers of the tests are those of the design's laws."""

from __future__ import annotations

import pytest

# The controls, with every kind of adapter that they can train.
CONTROLS = [
    pytest.param({"name": "local", "rank": 3}, id="local"),
    pytest.param({"name": "local", "rank": 2, "adapter": "factors"}, id="local, factors"),
    pytest.param({"name": "central", "rank": 3}, id="central"),
    pytest.param({"name": "central", "rank": 2, "adapter": "factors"}, id="central, factors"),
    pytest.param({"name": "local", "rank": 3, "blocks": 2}, id="local, two blocks"),
    pytest.param({"name": "local", "rank": 3, "blocks": 2, "scalars": True}, id="local, scalars"),
    pytest.param({"name": "local", "rank": 2, "adapter": "factors", "alpha": 6}, id="local, factors with alpha"),
    pytest.param({"name": "central", "rank": 3, "blocks": 2}, id="central, two blocks"),
    pytest.param({"name": "central", "rank": 3, "blocks": 2, "scalars": True}, id="central, scalars"),
    pytest.param({"name": "central", "rank": 2, "adapter": "factors", "alpha": 6}, id="central, factors with alpha"),
]
