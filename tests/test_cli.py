"""The command line: every field is a flag and a variable, TGI's flags are taken, wrong usage is one line."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest

from jaxserve import cli
from jaxserve.cli.serve import read_options
from jaxserve.cli.tgi import REFUSED, UNNEEDED
from jaxserve.cli.vllm import OUR_NAMES
from jaxserve.config import EngineOptions, HostOptions, ModelOptions, ServerOptions
from jaxserve.errors import StartupError

OPTIONS = (ModelOptions, EngineOptions, ServerOptions)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """The one line that wrong usage is told in."""
    with pytest.raises(SystemExit) as exit:
        read_options(arguments, dict(environment or {}))
    assert exit.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxserve: ") and told.count("\n") == 1 and told.endswith("\n")
    return told


def test_defaults_are_the_fields_own() -> None:
    assert read_options([], {}) == (ModelOptions(), EngineOptions(), ServerOptions(), HostOptions(num_hosts=1))


EXAMPLES = {tuple: ("one", ("one",)), int: ("7", 7), float: ("0.5", 0.5), str: ("some", "some"), bool: ("true", True)}


def example(options: type, name: str) -> tuple[str, object]:
    """A legal text for a field and the value it means."""
    special = {
        "mesh": ("2x3", "2x3"),
        "hostname": ("127.0.0.1", "127.0.0.1"),
        "prefix_caching": ("false", False),
        "rope_factor": ("2", 2.0),
    }
    if name in special:
        return special[name]
    field = next(f for f in fields(options) if f.name == name)
    if field.metadata["choices"]:
        return (field.metadata["choices"][-1],) * 2
    kind = next(k for k in EXAMPLES if k.__name__ in str(field.type))
    return EXAMPLES[kind]


EVERY_FIELD = [(options, field.name) for options in OPTIONS for field in fields(options)]


@pytest.mark.parametrize(("options", "name"), EVERY_FIELD, ids=[name for _, name in EVERY_FIELD])
def test_every_field_is_a_flag_and_a_variable(options: type, name: str) -> None:
    text, value = example(options, name)
    place = OPTIONS.index(options)
    beside = {"rope_factor": ["--rope-scaling", "linear"], "rope_scaling": ["--rope-factor", "2"]}.get(name, [])
    assert getattr(read_options(["--" + name.replace("_", "-"), text, *beside], {})[place], name) == value
    assert getattr(read_options(beside, {name.upper(): text})[place], name) == value


def test_a_flag_goes_before_its_variable_and_empty_is_unset() -> None:
    assert read_options(["-p", "81"], {"PORT": "82"})[2].port == 81
    assert read_options([], {"PORT": "", "MAX_BATCH_SIZE": ""})[2].port == ServerOptions().port


def test_booleans_take_every_spelling() -> None:
    def caching(*arguments: str) -> bool:
        return read_options(arguments, {})[1].prefix_caching

    assert (
        caching()
        and caching("--prefix-caching")
        and caching("--prefix-caching", "true")
        and caching("--no-prefix-caching", "--prefix-caching")
    )
    assert not caching("--no-prefix-caching") and not caching("--prefix-caching", "false") and not caching("--prefix-caching=0")


def test_origins_repeat() -> None:
    assert read_options(["--cors-allow-origin", "a", "--cors-allow-origin", "b"], {})[2].cors_allow_origin == ("a", "b")
    assert read_options([], {"CORS_ALLOW_ORIGIN": "a,b"})[2].cors_allow_origin == ("a", "b")


def test_hostname_variable_counts_only_as_an_address() -> None:
    assert read_options([], {"HOSTNAME": "my-container-6f7d"})[2].hostname == ServerOptions().hostname
    assert read_options([], {"HOSTNAME": "::1"})[2].hostname == "::1"


def test_a_tgi_command_line_works(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--model-id m --num-shard 4 --sharded true -p 8080 --max-input-length 1000 --max-total-tokens 2000 --cuda-memory-fraction 0.8"
    model, engine, server, _ = read_options(line.split(), {})
    assert (model.model_id, engine.mesh, server.port, engine.max_input_tokens) == ("m", "1x4", 8080, 1000)
    assert capsys.readouterr().err == ""
    assert read_options([], {"NUM_SHARD": "2", "MAX_INPUT_LENGTH": "9"})[1] == EngineOptions(mesh="1x2", max_input_tokens=9)
    assert read_options(["--mesh", "2x2"], {"NUM_SHARD": "8"})[1].mesh == "2x2"


def test_values_that_ask_for_nothing_are_no_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    read_options(["--kv-cache-dtype", "auto", "--speculate", "0", "--usage-stats", "off"], {"QUANTIZE": "", "NGROK": "false"})
    assert capsys.readouterr().err == ""
    assert "exl2 kernels" in refused(capsys, ["--quantize", "exl2"]) and "exl2 kernels" in refused(capsys, [], {"QUANTIZE": "exl2"})
    assert "--quantize must be one of" in refused(capsys, ["--quantize", "int3"])


def test_strict_takes_tgis_limits_where_none_are_given() -> None:
    _, engine, server, _ = read_options(["--tgi-strict", "--max-top-n-tokens", "9"], {"MAX_STOP_SEQUENCES": "8"})
    assert (engine.max_concurrent_requests, server.max_client_batch_size) == (128, 4)
    assert (server.max_top_n_tokens, server.max_stop_sequences) == (9, 8)


def test_sagemaker() -> None:
    environment = {
        "HF_MODEL_ID": "m",
        "HF_MODEL_REVISION": "r",
        "SM_NUM_GPUS": "2",
        "HF_MODEL_TRUST_REMOTE_CODE": "true",
        "PORT": "80",
        "HF_API_TOKEN": "t",
    }
    model, engine, server, _ = read_options([], environment)
    assert (model.model_id, model.revision, engine.mesh, server.port) == ("m", "r", "1x2", 8080)
    assert environment["HF_TOKEN"] == "t"
    assert read_options([], {"SAGEMAKER_BIND_TO_PORT": "81"})[2].port == 81
    assert read_options([], {"HF_MODEL_ID": "m", "MODEL_ID": "own"})[0].model_id == "own"
    assert read_options(["-p", "82"], {"HF_MODEL_ID": "m"})[2].port == 82


def test_vertex(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_options([], {"AIP_HTTP_PORT": "8080", "PORT": "80"})[2].port == 8080
    assert "AIP_HEALTH_ROUTE" in refused(capsys, [], {"AIP_HEALTH_ROUTE": "health"})


@pytest.mark.parametrize(("text", "level"), [("warn", "warning"), ("TRACE", "debug"), ("a=debug,error", "error"), ("a=debug", "info")])
def test_log_level_as_tgi_has_it(text: str, level: str) -> None:
    assert read_options([], {"LOG_LEVEL": text})[2].log_level == level


@pytest.mark.parametrize("name", ["paged", "flashdecoding", "flashdecoding-ipex", "flashinfer"])
def test_tgis_names_of_attention_kernels_leave_the_choice(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_options([], {"ATTENTION": name})[1].attention == "auto"
    assert "--attention must be one of" in refused(capsys, ["--attention", name])


def test_the_hub_cache_reaches_the_environment() -> None:
    environment: dict[str, str] = {}
    read_options(["--huggingface-hub-cache", "/data"], environment)
    assert environment == {"HF_HUB_CACHE": "/data"}


@pytest.mark.parametrize("flag", UNNEEDED, ids=lambda f: f.name)
def test_unneeded_tgi_flags_warn_and_say_why(flag, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([f"--{flag.name}", "1", "--port", "80"], [f"--{flag.name}", "--port", "80"]):
        assert read_options(arguments, {})[2].port == 80
        told = capsys.readouterr().err
        assert f"--{flag.name}" in told and flag.why in told and told.count("\n") == 1
    read_options([], {flag.name.replace("-", "_").upper(): "1"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", REFUSED, ids=lambda f: f.name)
def test_flags_of_missing_features_are_refused(flag, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag.why in refused(capsys, [f"--{flag.name}", "1"])
    assert flag.why in refused(capsys, [], {flag.name.replace("-", "_").upper(): "1"})


def test_what_vllm_calls_otherwise_is_a_flag() -> None:
    flags = {field.name.replace("_", "-") for options in OPTIONS for field in fields(options)} | {"huggingface-hub-cache"}
    assert flags.issuperset(OUR_NAMES.values()) and flags.isdisjoint(OUR_NAMES)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("--prot 80", "--prot"),
        ("--por 80", "--por"),
        ("gnerate", "gnerate"),
        ("--quantization fp8", "did you mean --quantize?"),
        ("--max-batch-sise=8", "did you mean --max-batch-size?"),
        ("--tensor-parallel-size 2", "did you mean --mesh?"),
        ("--max_model_len=4096", "did you mean --max-total-tokens?"),
        ("--enable-prefix-caching", "did you mean --prefix-caching?"),
        ("--swap-space 4", "--help"),
        ("--quantize exl2", "CUDA only"),
        ("--quantize nf4", "bitsandbytes-nf4"),
        ("--port", "--port"),
        ("--port eighty", "eighty"),
        ("--port 65536", "65535"),
        ("--port -1", "--port"),
        ("--dtype int3", "int3"),
        ("--sync maybe", "maybe"),
        ("--mesh 4", "DxT"),
        ("--mesh 0x1", "DxT"),
        ("--cuda-memory-fraction nan", "finite"),
        ("--cuda-memory-fraction 1.5", "at most 1"),
        ("--max-batch-size 0", "at least 1"),
        ("--max-input-tokens 10 --max-total-tokens 10", "less than"),
        ("--num-shard 4 --mesh 2x2", "--num-shard 4"),
        ("--num-shard 0", "at least 1"),
        ("--num-shard two", "two"),
        ("--sharded true", "--num-shard"),
        ("--rope-scaling linear", "--rope-factor"),
        ("--rope-scaling yarn --rope-factor 2", "linear"),
        ("--sharded false --num-shard 2", "different"),
        ("--max-input-length 5 --max-input-tokens 6", "different"),
    ],
)
def test_wrong_usage_is_one_line(line: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in refused(capsys, line.split())


@pytest.mark.parametrize("variable", ["PORT", "NUM_SHARD", "MAX_INPUT_LENGTH", "PREFIX_CACHING", "CUDA_MEMORY_FRACTION"])
def test_a_wrong_variable_is_named(variable: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert variable in refused(capsys, [], {variable: "many"})


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        read_options(["--help"], {})
    told = capsys.readouterr().out
    assert exit.value.code == 0
    for _, name in EVERY_FIELD:
        assert name.replace("_", "-") in told
    assert all(f"--{flag.name}" in told for flag in UNNEEDED + REFUSED)
    assert all(command in told for command in cli.COMMANDS)
    assert max(map(len, told.splitlines())) <= 140


def test_env_tells_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        read_options(["--env"], {})
    told = capsys.readouterr().out
    assert exit.value.code == 0 and "jax: " in told and "python: 3." in told and "cpu: " in told


def test_env_beside_what_to_serve_does_not_end_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    """TGI goes on, and deployments have the flag among others."""
    for arguments, environment in (["--env", "--port", "80"], {}), (["-e"], {"MODEL_ID": "m"}), (["-e"], {"HF_MODEL_ID": "m"}):
        read_options(arguments, environment)
        assert "python: 3." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "environment", "mesh"),
    [
        (["--sharded", "true"], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x3"),
        ([], {"SHARDED": "true", "CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x3"),
        (["--sharded", "true", "--num-shard", "2"], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x2"),
        ([], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x1"),
        (["--tgi-strict"], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x3"),
        (["--tgi-strict"], {"CUDA_VISIBLE_DEVICES": "4,5,6", "JAX_PLATFORMS": "cpu"}, "1x1"),
        (["--tgi-strict"], {"CUDA_VISIBLE_DEVICES": ""}, "1x1"),
        (["--tgi-strict", "--sharded", "false"], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x1"),
        (["--tgi-strict", "--num-shard", "2"], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "1x2"),
        (["--tgi-strict"], {"CUDA_VISIBLE_DEVICES": "4,5,6", "MESH": "2x1"}, "2x1"),
    ],
)
def test_sharded_takes_all_gpus(arguments: list[str], environment: dict[str, str], mesh: str) -> None:
    assert read_options(arguments, environment)[1].mesh == mesh


def test_errors_raised_on_purpose_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: object) -> int:
        raise StartupError("no such folder: /nowhere")

    monkeypatch.setattr("jaxserve.cli.serve.run", fail)
    assert cli.main(["serve"]) == 1 and cli.main([]) == 1
    assert capsys.readouterr().err == "jaxserve: no such folder: /nowhere\n" * 2


def test_a_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "jaxserve", "--env"]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60, env=buffered)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_module_runs_without_jax() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jaxserve", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("jaxserve ")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not {name for name in imported if name.split(".")[0] in ("jax", "jaxlib", "transformers", "numpy", "grpc")}
