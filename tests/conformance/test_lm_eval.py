"""lm-eval's `local-completions` end to end: it scores texts by echoed log probabilities, generates, and asks the server for token ids."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jaxserve.config import cache_folder
from jaxserve.weights.demo import _installer

pytestmark = pytest.mark.demo

CAPITALS = {"France": "Paris London", "Germany": "Madrid Berlin", "Italy": "Rome Oslo", "Japan": "Cairo Tokyo", "Spain": "Madrid Lima"}
ANSWERS = {"France": 0, "Germany": 1, "Italy": 0, "Japan": 1, "Spain": 0}
METRIC = "metric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]\n"
TASK = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
CHOICES = (
    'output_type: multiple_choice\ndoc_to_text: "The capital of {{country}} is"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
)
COUNTING = (
    'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{next}}"\n'
    'generation_kwargs: {until: [","], max_gen_toks: 8, temperature: 0}\n'
    "filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
)


@pytest.fixture(scope="module")
def lm_eval() -> Path:
    """The folder that lm-eval and all it needs are installed in: too much for the tests' own environment."""
    requirements = Path(__file__).parent / "lm_eval.txt"
    folder = cache_folder() / "clients" / "lm-eval-0.4.13"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        target = Path(tempfile.mkdtemp(dir=folder.parent))
        flags = ["--quiet", "--no-deps", "--require-hashes", "--target", str(target), "-r", str(requirements)]
        subprocess.run([*_installer(), *flags], check=True, timeout=600)
        try:
            target.rename(folder)
        except OSError:  # another test process was faster
            shutil.rmtree(target)
    return folder


def test_two_small_tasks(server_url: str, lm_eval: Path, tmp_path: Path):
    capitals = [{"country": country, "choices": CAPITALS[country].split(), "label": ANSWERS[country]} for country in CAPITALS]
    counting = [{"text": ", ".join(map(str, range(start, start + 6))) + ",", "next": str(start + 6)} for start in (1, 3, 10, 20)]
    for name, rows, rest in (("capitals", capitals, CHOICES + METRIC % "acc"), ("counting", counting, COUNTING + METRIC % "exact_match")):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    arguments = f"base_url={server_url}/v1/completions,model=tgi,num_concurrent=2,max_retries=1,tokenizer_backend=remote"
    environment = {**os.environ, "PYTHONPATH": str(lm_eval), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "-"}
    command = [sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    tasks = ["--include_path", str(tmp_path), "--tasks", "capitals,counting", "--output_path", str(tmp_path / "out")]
    done = subprocess.run([*command, *tasks], env=environment, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(told.read_text())["results"]
    assert results["capitals"]["acc,none"] == 1.0 and results["counting"]["exact_match,strip"] == 1.0, results
