"""Every streamed answer equals its unstreamed twin: random requests to all routes, answered by a tiny model."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from answer_templates import TEMPLATES
from engines import tiny_runner
from live_front_end import LiveFrontEnd
from stream_twins import random_request, twins
from tiny_models import END_OF_TURN, EOS

from jaxserve.engine import AsyncEngine

SEEDS = range(67, 227)  # together they have all that random_request() knows


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFrontEnd]:
    """The tiny model behind the real front end; its template is short, and speaks of tools and of thinking."""
    folder = tmp_path_factory.mktemp("twins") / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATES["thinking"]}))
    runner = tiny_runner(tiny_checkpoint("llama"))
    engine = runner.engine((EOS, END_OF_TURN))
    engine.info = replace(engine.info, model_path=str(folder))
    front_end = LiveFrontEnd(folder, engine=AsyncEngine(engine, 64))
    front_end.start()
    yield front_end
    front_end.stop()


def test_twins(tiny: LiveFrontEnd):
    num_calls = num_thoughts = 0
    for seed in SEEDS:
        path, body = random_request(seed, max_tokens=40)
        streamed, whole = twins(tiny.client, path, body)
        assert streamed == whole, (path, body)
        told = json.dumps(streamed)
        num_calls += '"tool_calls": [' in told or '"function_call"' in told or '"tool_use"' in told
        num_thoughts += '"reasoning_content"' in told
    assert num_calls > 10 and num_thoughts > 0
