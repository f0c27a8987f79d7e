"""Environment variables by other names: SageMaker's, Vertex AI's, TGI's, in terms of jaxserve's own."""

from jaxserve.errors import StartupError

# Variable -> what it is called here. One that is set by its own name too goes before.
_SYNONYMS = {
    "HF_MODEL_ID": "MODEL_ID",
    "HF_MODEL_REVISION": "REVISION",
    "SM_NUM_GPUS": "NUM_SHARD",
    "HF_MODEL_QUANTIZE": "QUANTIZE",
    "HF_MODEL_TRUST_REMOTE_CODE": "TRUST_REMOTE_CODE",
    "HF_API_TOKEN": "HF_TOKEN",
}
_SAGEMAKER = ("HF_MODEL_ID", "SM_NUM_GPUS", "SAGEMAKER_BIND_TO_PORT")
SAGEMAKER_PORT = "8080"
# Names of TGI's kernels, which deployments set to work around one of the others.
_TGI_ATTENTION = ("paged", "flashdecoding", "flashdecoding-ipex", "flashinfer")
_LEVELS = {"trace": "debug", "warn": "warning", "off": "error", "critical": "error"}
_VERTEX_ROUTES = ("AIP_PREDICT_ROUTE", "AIP_HEALTH_ROUTE")


def apply_platforms(environment: dict[str, str]) -> None:
    """Add what platforms say in their own words.

    SageMaker and Vertex AI tell the port that they ask, which goes before PORT, because images set that one for everybody.

    Args:
        environment: changed in place.

    Raises:
        StartupError: Vertex AI's routes are no paths.
    """
    for name, own in _SYNONYMS.items():
        if (value := environment.get(name)) and not environment.get(own):
            environment[own] = value
    if port := environment.get("AIP_HTTP_PORT"):
        environment["PORT"] = port
    elif any(environment.get(name) for name in _SAGEMAKER):
        environment["PORT"] = environment.get("SAGEMAKER_BIND_TO_PORT") or SAGEMAKER_PORT
    if level := environment.get("LOG_LEVEL"):
        environment["LOG_LEVEL"] = _level(level)
    if environment.get("ATTENTION") in _TGI_ATTENTION:
        environment["ATTENTION"] = "auto"
    for name in _VERTEX_ROUTES:
        if (route := environment.get(name)) and (not route.startswith("/") or "{" in route or "}" in route):
            raise StartupError(f"environment variable {name}: must be a path. Given: {route}")


def _level(text: str) -> str:
    """TGI takes "info" and directives such as "text_generation_router=debug,warn", of which the one for everything counts here."""
    level = next((part.strip().lower() for part in text.split(",") if "=" not in part), "info")
    return _LEVELS.get(level, level)
