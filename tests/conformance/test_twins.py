"""Every streamed answer equals its unstreamed twin: random requests to all routes, answered by the demo model."""

import httpx
import pytest
from stream_twins import random_request, twins

pytestmark = pytest.mark.demo


def test_twins(server_url: str):
    with httpx.Client(base_url=server_url, timeout=120) as client:
        for seed in range(1000, 1040):
            path, body = random_request(seed, max_tokens=24)
            whole, streamed = twins(client, path, body)
            assert streamed == whole, (path, body)
