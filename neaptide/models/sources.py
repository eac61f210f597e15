"""Where a model comes from: the built-in guide, a directory, a store, or a converted model on the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from neaptide.config import StoreSettings
from neaptide.errors import ModelError
from neaptide.models import directory, store
from neaptide.models.cache import Cache
from neaptide.models.directory import ModelDir
from neaptide.models.toolchain import Report

GUIDE = Path(__file__).parent / "guide"
STORED = "store:"
NO_STORE = StoreSettings()
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,128})?")
HUB_FILES = ["*.xml", "*.bin", "*.json", "*.jinja"]
HUB_LEFT_OUT = ["openvino_tokenizer.*", "openvino_detokenizer.*", "pytorch_model*", "original/*"]


def resolve(source: str | None, cache_dir: Path, report: Report, stored: StoreSettings = NO_STORE) -> ModelDir:
    """The checked directory of `source`: None or "guide" = built in; `store:NAME` or `store:NAME@DIGEST`; a path
    (anything that exists, or begins with "." "/" "~"); else a Hugging Face id `org/name` or `org/name@revision`,
    downloaded once into `cache_dir`.

    Raises ModelError: E201 nothing there, E202 a file missing or corrupt, E203 not converted, E204-E207 the hub,
    E230-E234 the store. Blocks while it downloads; `report` gets a line at each stage.
    """
    if source is None or source == "guide":
        return directory.read(GUIDE, "guide")
    if source.startswith(STORED):
        return _from_store(store.parse_ref(source.removeprefix(STORED)), stored, report)
    path = Path(source).expanduser()
    if path.exists() or source[0] in "./~" or not HUB_ID.fullmatch(source):
        return directory.read(path)
    return _from_hub(source, cache_dir, report)


def node_cache(settings: StoreSettings) -> Cache:
    return Cache(Path(settings.cache).expanduser(), int(settings.cache_gib * (1 << 30)))


def opened(settings: StoreSettings) -> store.Store:
    """The store that is configured; ModelError E230 where none is."""
    if settings.root:
        return store.at(settings.root)
    raise ModelError(
        "no store is configured",
        why="models of a store are named by `store:` and live in a directory or behind a URL",
        fix="add `store: {root: DIR}` to neaptide.yaml, or pass --store DIR",
        code="E230",
    )


def _from_store(ref: store.Ref, settings: StoreSettings, report: Report) -> ModelDir:
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            report(f"{ref.name}: {told * 10} % of {total / 1e6:,.1f} MB from the store")

    path = node_cache(settings).pull(opened(settings), ref, report, tell)
    return directory.read(path, ref.name)


def _from_hub(source: str, cache_dir: Path, report: Report) -> ModelDir:
    repository, _, revision = source.partition("@")
    target = cache_dir / (source.replace("/", "--").replace("@", "--"))
    if not target.exists():
        _download(repository, revision or None, target, report)
    return directory.read(target, repository)


def _download(repository: str, revision: str | None, target: Path, report: Report) -> None:
    """The revision is pinned to a commit first. The download directory carries that commit, so that a broken run
    resumes and two revisions never mix; it is renamed once whole."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as e:
        raise ModelError(
            f"{repository} is on the Hugging Face hub, and its client is not installed",
            why="neither a directory of that name nor the optional extra was found",
            fix="pip install 'neaptide[hub]', or name a local directory",
            code="E207",
        ) from e
    report(f"asking the Hugging Face hub for {repository}")
    # First match wins: the gated error is a kind of the not-found error.
    reasons: tuple[tuple[type[Exception], str, str, str], ...] = (
        (errors.GatedRepoError, "E206", "is gated", "accept its terms on the hub, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "E205", "was not found", "check the id; for a private one set HF_TOKEN"),
        (errors.RevisionNotFoundError, "E205", "has no such revision", "check the part after @"),
        (errors.HFValidationError, "E205", "is not an id", "write org/name or org/name@revision"),
        (errors.LocalEntryNotFoundError, "E204", "cannot be reached", _OFFLINE),
        (errors.OfflineModeIsEnabled, "E204", "cannot be reached", "unset HF_HUB_OFFLINE, or name a directory"),
        (Exception, "E204", "could not be downloaded", _OFFLINE),
    )
    try:
        commit = hub.HfApi().model_info(repository, revision=revision).sha or ""
        partial = target.with_name(f".{target.name}.{commit}")
        report(f"downloading {repository} at {commit[:12]} into {target.parent}")
        hub.snapshot_download(
            repository,
            revision=commit,
            local_dir=partial,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_LEFT_OUT,
        )
    except Exception as e:
        _kind, code, state, fix = next(r for r in reasons if isinstance(e, r[0]))
        why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise ModelError(f"{repository} {state}", why=why, fix=fix, code=code) from e
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    _whole(repository, partial)
    os.rename(partial, target)
    report(f"{repository} is ready")


_OFFLINE = (
    "check the network or HF_ENDPOINT (a mirror), then run the same command again: it resumes; "
    "or copy the directory here and name its path"
)


def _whole(repository: str, partial: Path) -> None:
    """A checkpoint that was never converted is refused before it takes its place in the cache."""
    if not (partial / directory.MODEL_XML).is_file():
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(
            f"{repository} holds no {directory.MODEL_XML}",
            why="only converted models are taken from the hub; the OpenVINO organisation has many",
            fix=f"download {repository} to a directory and run `neaptide models convert DIR --to int8`",
            code="E203",
        )
