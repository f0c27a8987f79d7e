"""Every streamed answer equals its unstreamed twin: random requests to all routes, answered by the demo model.

tests/test_stream_twins.py sends many more to a tiny model.
"""

import httpx
import pytest
from stream_twins import random_request, twins

pytestmark = pytest.mark.demo


def test_twins(server_url: str):
    with httpx.Client(base_url=server_url, timeout=120) as client:
        for seed in range(1381, 1421):
            path, body = random_request(seed, max_tokens=24)
            streamed, whole = twins(client, path, body)
            assert streamed == whole, (path, body)
