"""Models from the hub, with the real huggingface_hub against a small server, and the demo model."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from tiny_models import write_checkpoint

from jaxserve.config import ModelOptions, cache_folder
from jaxserve.errors import ModelNotFound
from jaxserve.weights import demo, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from jaxserve.config import ModelOptions
from jaxserve.errors import ModelNotFound
from jaxserve.weights import resolve_model
for line in sys.stdin.read().splitlines():
    model_id, revision = line.split()
    try:
        source = resolve_model(ModelOptions(model_id=model_id, revision=None if revision == "-" else revision))
        print(source.revision or "-", source.path.name if source.is_gguf else sorted(path.name for path in source.path.iterdir()))
    except ModelNotFound as error:
        print("ModelNotFound:", error)
assert "jax" not in sys.modules
"""


def resolve(lines: list[str], cache: Path, **environment: str) -> list[str]:
    """What a fresh process makes of "model_id revision" lines; huggingface_hub reads its environment once, when it is imported."""
    variables = {"PATH": "/usr/bin:/bin", "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], input="\n".join(lines), env=variables | environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


class Hub(http.server.BaseHTTPRequestHandler):
    """tiny/llama asks for a token, and tiny/one, two and parts, which have GGUF files; tiny/gated is gated, the rest is not there."""

    folder: Path
    gguf: ClassVar = {
        "one": ["config.json", "q4/Tiny.Q4_0.gguf"],
        "two": ["README.md", "Tiny.Q4_0.gguf", "Tiny.Q8_0.gguf"],
        "parts": [f"q4/Tiny-0000{i}-of-00002.gguf" for i in (1, 2)],
    }

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = self.path.split("?")[0]
        if "/tiny/gated" in path:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        files = next((files for name, files in self.gguf.items() if f"/tiny/{name}" in path), None)
        if ("/tiny/llama" not in path and files is None) or self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path:
            if path.endswith("/nonsense"):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self.answer_json({"id": "tiny/llama", "sha": COMMIT, "siblings": []})
        names = files or [
            *(file.name for file in self.folder.iterdir()),
            "original/consolidated.00.pth",
            "consolidated.safetensors",
            "photo.png",
        ]
        if "/tree/" in path:
            return self.answer_json([{"type": "file", "path": n, "size": 1, "oid": f"{i:040x}"} for i, n in enumerate(names)])
        body = b"GGUF" if path.endswith(".gguf") else (self.folder / path.rsplit("/", 1)[1]).read_bytes()
        return self.answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(path) & 0xFFFFFFFF:040x}"'})

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Address of a server that answers as the hub does."""
    handler = type("TinyHub", (Hub,), {"folder": write_checkpoint(tmp_path / "hub", "llama")})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_hub_models(hub: str, tmp_path: Path) -> None:
    asked = ["tiny/llama -", f"tiny/llama {COMMIT}", "tiny/llama nonsense", "tiny/gated -", "tiny/other -", "tiny/..bad -"]
    found, pinned, revision, gated, absent, invalid = resolve(asked, tmp_path / "cache", HF_ENDPOINT=hub, HF_TOKEN="secret")
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert found == f"- {files}"
    assert pinned == f"{COMMIT} {files}"
    assert revision == "ModelNotFound: tiny/llama has no revision nonsense"
    assert gated.startswith("ModelNotFound: tiny/gated is a gated model: accept its terms") and "HF_TOKEN" in gated
    assert absent == "ModelNotFound: tiny/other is not on the hub, or it is private and HF_TOKEN does not open it"
    assert invalid == "ModelNotFound: tiny/..bad is neither a file, a folder nor a hub id"

    cached, unknown = resolve(["tiny/llama -", "tiny/other -"], tmp_path / "cache", HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert cached == found
    assert unknown == "ModelNotFound: tiny/other is not complete in the local cache, and HF_HUB_OFFLINE forbids to download it"
    unreachable = resolve(["tiny/other -"], tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable == [
        "ModelNotFound: tiny/other is not complete in the local cache, and the hub cannot be reached;"
        " a folder or a .gguf file can be served without it"
    ]


def test_gguf_files_of_the_hub(hub: str, tmp_path: Path) -> None:
    """A repository's only one is its model; of several one is named. A model in several files is fetched whole, whichever is named."""
    asked = [
        "tiny/one -",
        "tiny/one/q4/Tiny.Q4_0.gguf main",
        "tiny/two/Tiny.Q8_0.gguf -",
        "tiny/two -",
        "tiny/two/x.gguf -",
        "tiny/two:8 -",
        "tiny/parts -",
        "tiny/parts/q4/Tiny-00002-of-00002.gguf -",
    ]
    only, named, other, several, absent, colon, *parts = resolve(asked, tmp_path / "cache", HF_ENDPOINT=hub, HF_TOKEN="secret")
    assert (only, named, other) == ("- Tiny.Q4_0.gguf", "main Tiny.Q4_0.gguf", "- Tiny.Q8_0.gguf")
    told = "(Tiny.Q4_0.gguf, Tiny.Q8_0.gguf)"
    assert several == f"ModelNotFound: tiny/two has several .gguf files: --model-id tiny/two/FILE names one of them {told}"
    assert absent == f"ModelNotFound: tiny/two has no file x.gguf {told}"
    assert colon.endswith("ORG/NAME/FILE.gguf names a .gguf file of the hub")
    assert parts == ["- Tiny-00001-of-00002.gguf"] * 2
    assert len(list((tmp_path / "cache").rglob("*-of-00002.gguf"))) == 2
    assert resolve(["tiny/two/Tiny.Q8_0.gguf -", "tiny/one -"], tmp_path / "cache", HF_HUB_OFFLINE="1") == [other, only]


@pytest.fixture
def demo_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "demo"


def fake_installer(folder: Path, body: str) -> list[str]:
    """A program called as pip is: what follows --target is where to put the package."""
    script = folder / "installer.py"
    script.write_text(f"import sys, pathlib, time\ntarget = pathlib.Path(sys.argv[sys.argv.index('--target') + 1])\n{body}\n")
    return [sys.executable, str(script)]


def test_demo_model_is_fetched_once(tmp_path: Path, demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when several processes start at the same time."""
    calls = tmp_path / "calls"
    body = f"open({str(calls)!r}, 'a').write('.')\ntime.sleep(0.3)\n(target / 'package').mkdir()\n"
    body += f"(target / 'package' / {demo._FILE!r}).write_bytes(b'model')"
    monkeypatch.setattr(demo, "_installer", lambda: fake_installer(tmp_path, body))
    monkeypatch.setattr(demo, "_SHA256", "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4")
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: resolve_model(ModelOptions()), range(4)))
    assert {source.path for source in sources} == {demo_cache / demo._FILE}
    assert sources[0].model_id == demo.DEMO_MODEL_ID and sources[0].is_gguf
    assert sources[0].path.read_bytes() == b"model"
    assert calls.read_text() == "."
    assert sorted(path.name for path in demo_cache.iterdir()) == [demo._FILE, "lock"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('first line\\nERROR: no such package')", "cannot be fetched: ERROR: no such package"),
        (f"(target / {demo._FILE!r}).write_bytes(b'other')", "arrived damaged"),
        ("time.sleep(60)", "did not arrive within"),
    ],
)
def test_demo_model_that_cannot_be_had(body: str, message: str, tmp_path: Path, demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_installer", lambda: fake_installer(tmp_path, body))
    monkeypatch.setattr(demo, "_TIMEOUT_SECONDS", 1)
    with pytest.raises(ModelNotFound, match=message) as caught:
        resolve_model(ModelOptions())
    assert "\n" not in str(caught.value)
    assert [path.name for path in demo_cache.iterdir()] == ["lock"]


def test_demo_model_without_installer(demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelNotFound, match="pip or uv"):
        resolve_model(ModelOptions())


def test_demo_model_in_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFound, match="cannot be kept in"):
        resolve_model(ModelOptions())


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/jaxserve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/jaxserve")
