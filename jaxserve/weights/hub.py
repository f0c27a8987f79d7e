"""Fetching a model from the hub with huggingface_hub, which keeps the cache and reads HF_TOKEN, HF_HUB_OFFLINE and HF_HOME."""

from pathlib import Path

from jaxserve.errors import ModelNotFound

_SETTINGS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WEIGHTS = ["*.safetensors"]
# Some repositories hold their weights a second time, in the format of the model's authors.
_IGNORED = ["consolidated*", "original/*", "onnx/*"]


def fetch_model(model_id: str, revision: str | None, with_weights: bool) -> Path:
    """The folder of a hub model in huggingface_hub's cache, downloaded as far as it is not there.

    Args:
        model_id: "organisation/name".
        revision: branch, tag or commit; None is the main branch.
        with_weights: otherwise only configuration and tokenizer.

    Raises:
        ModelNotFound: one line saying why.
    """
    from huggingface_hub import constants, errors, snapshot_download

    patterns = _SETTINGS + (_WEIGHTS if with_weights else [])
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except errors.HFValidationError:
        reason = "is neither a file, a folder nor a hub id"
    except errors.GatedRepoError:
        reason = "is a gated model: accept its terms on its page at the hub, then set HF_TOKEN to a token of that account"
    except errors.RepositoryNotFoundError:
        reason = "is not on the hub, or it is private and HF_TOKEN does not open it"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except errors.LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            reason = "is not complete in the local cache, and HF_HUB_OFFLINE forbids to download it"
        else:
            reason = "is not complete in the local cache, and the hub cannot be reached; a folder or a .gguf file can be served without it"
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = f"cannot be downloaded: {next(iter(str(error).splitlines()), type(error).__name__)}"
    raise ModelNotFound(f"{model_id} {reason}")
