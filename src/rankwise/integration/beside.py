"""What lies beside a model's weights and says how it is used: processors, sentence-transformers' modules, licences.

It is copied, but for weights, their index, code, what is hidden and what is written anew; of folders those that
`modules.json` names.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME

from rankwise.errors import RankwiseError, reason
from rankwise.integration.files import LARGEST_JSON, PICKLES, read_json

logger = logging.getLogger(__name__)
MODULES = "modules.json"
LEFT = (*PICKLES, "*.safetensors", "*.index.json", "*.py", ".*")
# Of a name on the hub:
FETCHED = ("*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*", "NOTICE*", "[0-9]_*/*")


def copy_beside(model: str | Path, folder: Path, own: Collection[str] = ()) -> None:
    """Copy what lies beside the weights of `model`, a folder or a name on the hub, to `folder`, which has weights.

    own: names that are not copied either. A `model` that is neither has nothing beside it.
    """
    original = _folder_of(str(model))
    if original is None:
        return
    root = original.resolve()
    if root.parent.name == "snapshots":  # of the hub's cache, whose files are links to the blobs beside it
        root = root.parent.parent
    for file in _found(original):
        to = folder / file.relative_to(original)
        inside = file.resolve().is_relative_to(root) and os.access(file, os.R_OK)  # no link that leads out
        if inside and file.name not in own and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


def _found(original: Path) -> Iterator[Path]:
    """The files to copy: those of modules all, weights too, but for code."""
    for file in sorted(original.iterdir()):
        if file.is_file() and file.stat().st_size <= LARGEST_JSON and not any(fnmatch(file.name, left) for left in LEFT):
            yield file
    for name in _modules(original):
        yield from (file for file in sorted((original / name).rglob("*")) if file.is_file() and file.suffix != ".py")


def _modules(original: Path) -> list[str]:
    """The folders of sentence-transformers' modules."""
    try:
        modules = read_json(original / MODULES) if (original / MODULES).is_file() else []
        names = [module["path"] for module in modules]
    except (RankwiseError, TypeError, KeyError):
        return []  # the file is copied as it is
    within = (n for n in names if isinstance(n, str) and n == os.path.basename(n) and not n.startswith("."))
    return [name for name in within if name and (original / name).is_dir()]


def _folder_of(model: str) -> Path | None:
    """The model's folder; of a name on the hub that in its cache, with what is small fetched."""
    if os.path.isfile(os.path.join(model, CONFIG_NAME)):
        return Path(model)
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(model, CONFIG_NAME), str):
            return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(FETCHED)))
    except HFValidationError:  # no such name can be there
        return None
    except Exception as error:  # the network fails in many ways
        logger.warning("what lies beside the weights of %s was not fetched: %s", model, reason(error))
    return None
