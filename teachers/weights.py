"""Where pretrained weights come from: ``hub:ID``, ``path:FOLDER`` or ``package:NAME/FOLDER``.

Files are read as data: no code of a package or a checkpoint is imported or run. Weights that are not there stop
the run; nothing falls back to random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from distill.contracts import UserError
from distill.runs import fingerprint, sha256_file

TRANSFORMERS = ("config.json", "model.safetensors")
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
"""Files that make a folder one of a format: its configuration and its weights."""
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]


def resolve_weights(
    weights: str | Sequence[str],
    sha256: str | None = None,
    base: Path | None = None,
    files: tuple[str, str] = TRANSFORMERS,
) -> Path:
    """Return the folder of the first source that is there.

    Args:
        weights: one source or several in order of preference, all of the same weights.
        sha256: expected hash of the file of weights (``model.safetensors``), in hex; checked when given.
        base: folder to which ``path:`` is relative; the working directory by default.
        files: the format's configuration and weights.

    Raises:
        UserError: no source is there, a source is malformed, or the hash differs.
    """
    sources = [weights] if isinstance(weights, str) else list(weights)
    problems = []
    for source in sources:
        try:
            folder = _resolve(source, base or Path.cwd(), files[0])
        except _NotThereError as problem:
            problems.append(f"{source}: {problem}")
            continue
        if sha256 is not None:
            _check_hash(folder / files[1], sha256, source)
        return folder
    raise UserError("pretrained weights are not there: " + "; ".join(problems))


def weights_identity(weights: str | Sequence[str] | None) -> list[str]:
    """What tells weights apart in a fingerprint: sources by name, local files and folders by their content."""
    sources = [weights] if isinstance(weights, str) else weights or ()
    return [_content(Path(source.removeprefix("path:"))) or source for source in sources]


def file_identity(file: str) -> str:
    """What tells a file apart in a fingerprint: its content, or its name where it is not there."""
    path = Path(file).resolve()
    return f"content:{_hash(path, path.stat().st_mtime_ns)}" if path.is_file() else file


def _content(place: Path) -> str | None:
    names = (*TRANSFORMERS, "tokenizer.json", "preprocessor_config.json", *OPEN_CLIP)
    files = [place, *(place / name for name in names)]
    hashes = [_hash(file, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"content:{fingerprint(hashes)}" if hashes else None


@lru_cache  # several stages ask for the same file
def _hash(file: Path, changed_ns: int) -> str:
    return sha256_file(file)


class _NotThereError(Exception):
    pass


def _resolve(source: str, base: Path, config: str) -> Path:
    scheme, _, rest = source.partition(":")
    if scheme == "path":
        folder = (base / rest).expanduser()
        if not (folder / config).is_file():
            kind = "transformers" if config in TRANSFORMERS else "open_clip"
            raise _NotThereError(f"no {config} in {folder}; expected a folder in {kind} format")
        return folder
    if scheme == "package":
        return _package_folder(rest, config)
    if scheme == "hub":
        return _hub_folder(rest)
    raise UserError(f"weights {source!r}: expected hub:ID, path:FOLDER or package:NAME/FOLDER")


def _package_folder(rest: str, config: str) -> Path:
    name, _, folder = rest.partition("/")
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise _NotThereError(f"package {name!r} is not installed; pip install {name}") from None
    for file in distribution.files or []:
        parent = file.parent.as_posix()
        if file.name == config and (parent == folder or parent.endswith(f"/{folder}")):
            return Path(str(distribution.locate_file(file))).parent
    raise _NotThereError(f"package {name!r} has no folder {folder!r} with a {config}")


def _hub_folder(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=PATTERNS))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise _NotThereError(f"could not be downloaded and is not in the local cache ({reason})") from error


def _check_hash(file: Path, expected: str, source: str) -> None:
    if not file.is_file():
        raise UserError(f"weights {source!r}: {file} is missing, so its pinned sha256 cannot be checked")
    found = sha256_file(file)
    if found != expected.lower():
        raise UserError(f"weights {source!r}: sha256 of {file.name} is {found}, the recipe pins {expected}")
