"""Models by name on the Hugging Face Hub: from the local cache, or downloaded with a progress bar."""

from __future__ import annotations

import re
from pathlib import Path

from gradless.errors import GradlessError

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.\-]*/[\w.\-]+)(/(?P<file>.+\.gguf))?")
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Files of a folder that are downloaded. Pickles never are, and Python code only if it is trusted."""


def local(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The path of a model on this machine, after a download if needed.

    Args:
        model: a path, or a name on the Hub: org/model for a folder, org/model/file.gguf for a file. HF_HUB_OFFLINE, HF_HOME
            and the token of a login are respected.
        trust_remote_code: download the repository's Python code too.

    Raises:
        GradlessError: there is no such path, and the name is not in the cache and cannot be downloaded.
    """
    path = Path(model)
    match = _NAME.fullmatch(str(model))
    if path.exists() or match is None:
        return path
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*WANTED, *(["*.py"] if trust_remote_code else [])]
    try:
        if match["file"]:
            return Path(hf_hub_download(match["repository"], match["file"]))
        return Path(snapshot_download(match["repository"], allow_patterns=wanted))
    except (LocalEntryNotFoundError, OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        forbidden = "HF_HUB_OFFLINE forbids to look for it on the Hub"
        why = forbidden if constants.HF_HUB_OFFLINE else f"the Hub gave none ({_first_line(error)})"
        raise GradlessError(f"there is no file or folder {model}, none of that name in the Hub's cache, and {why}.") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
