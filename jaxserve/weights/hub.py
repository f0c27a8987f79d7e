"""Fetching a model from the hub with huggingface_hub, which keeps the cache and reads HF_TOKEN, HF_HUB_OFFLINE and HF_HOME."""

from pathlib import Path

from jaxserve.errors import ModelNotFound
from jaxserve.weights.gguf_parts import models_of, part_names

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
    return _download(model_id, revision, _SETTINGS + (_WEIGHTS if with_weights else []))


def fetch_gguf(model_id: str, revision: str | None, file: str) -> Path:
    """One .gguf file of a hub model, as `fetch_model` fetches folders; the first, of a model in several, of which all are fetched.

    Raises:
        ModelNotFound: one line saying why.
    """
    files = part_names(file)
    folder = _download(model_id, revision, files)
    for name in files:
        if not (folder / name).is_file():
            raise ModelNotFound(f"{model_id} has no file {name}{_told(_gguf_files(model_id, revision))}")
    return folder / files[0]


def only_gguf(model_id: str, revision: str | None, folder: Path) -> str | None:
    """The .gguf file (the first, of a model in several) of a hub model that has nothing else to serve; None: it has none.

    Args:
        folder: what was fetched; its files count where the hub cannot be asked.

    Raises:
        ModelNotFound: there are several.
    """
    files = models_of(_gguf_files(model_id, revision) or (str(path.relative_to(folder)) for path in folder.rglob("*.[gG][gG][uU][fF]")))
    if len(files) > 1:
        raise ModelNotFound(f"{model_id} has several .gguf files: --model-id {model_id}/FILE names one of them{_told(files)}")
    return files[0] if files else None


def _gguf_files(model_id: str, revision: str | None) -> list[str]:
    """Paths within a hub model; empty where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return sorted(file for file in HfApi().list_repo_files(model_id, revision=revision) if file.lower().endswith(".gguf"))
    except Exception:  # of its HTTP library, which changes with its version; why the hub cannot be reached, fetch_model tells
        return []


def _told(files: list[str]) -> str:
    return f" ({', '.join(files[:12])}{', ...' if len(files) > 12 else ''})" if files else ""


def _download(model_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except errors.HFValidationError:
        reason = "is neither a file, a folder nor a hub id" + (
            "; ORG/NAME/FILE.gguf names a .gguf file of the hub" if ":" in model_id else ""
        )
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
