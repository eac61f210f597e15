"""A Hugging Face directory -> an OpenVINO directory with int8, int4 or bf16 weights.

check the source -> stage it -> export in the tools' environment -> check the result -> rename into place. Until the
rename everything lies in a hidden directory beside the target, so an interrupted run leaves nothing half made; what a
killed run left is cleared by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import msgspec

from neaptide.errors import ModelError
from neaptide.models import directory
from neaptide.models.directory import ModelDir
from neaptide.models.toolchain import OptimumToolchain, Precision, Report, Toolchain, run

CACHE = Path(".cache") / "neaptide" / "convert-env"
# Weights of the result per byte of a 16-bit source, with room for embeddings that stay wider.
SHARE = {"int4": 0.5, "int8": 0.7, "bf16": 1.1}
# The exporter's own notes: they name the staging path, and the engine reads none of them.
NOT_THE_MODEL = ("openvino_config.json", "openvino_tokenizer.*", "openvino_detokenizer.*")


class ConvertReport(msgspec.Struct, frozen=True, kw_only=True):
    source: Path
    out: Path
    to: str
    model: ModelDir
    source_bytes: int  # of weights
    seconds: float


def convert(
    source_dir: Path,
    out_dir: Path,
    to: Precision,
    state_dir: Path | None = None,
    report: Report = print,
    toolchain: Toolchain | None = None,
) -> ConvertReport:
    """Write `out_dir`; `source_dir` is only read. The tools live under `state_dir`, or ~/.cache/neaptide/convert-env.

    Raises ModelError: E203 no convertible source, E208 the export failed, E209 the tools could not be installed,
    E211 `to` or `out_dir` unusable, E212 disk space.
    """
    began = time.monotonic()
    source_dir, out_dir = source_dir.resolve(), out_dir.resolve()
    config = _source_config(source_dir)
    weights = sum(f.stat().st_size for f in source_dir.glob("*.safetensors"))
    _target_usable(out_dir, to, weights)
    tools = toolchain or OptimumToolchain((state_dir / "convert-env") if state_dir else Path.home() / CACHE)
    tools.ready(report)
    _clear_abandoned(out_dir)
    work = out_dir.parent / f".{out_dir.name}.converting-{os.getpid()}"
    try:
        (work / "source").mkdir(parents=True)
        _stage(source_dir, work / "source", config, to)
        report(f"converting {source_dir.name} to {to}")
        group_size = _group_size(config) if to == "int4" else None
        _must(tools.export_argv(work / "source", work / "out", to, group_size), "the export failed", report)
        model = _checked(work / "out", tools, to, report)
        os.rename(work / "out", out_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    model = msgspec.structs.replace(model, path=out_dir, name=out_dir.name)
    report(f"{out_dir}: {model.weight_bytes / 1e6:.1f} MB of {model.precision} weights")
    seconds = round(time.monotonic() - began, 2)
    return ConvertReport(source=source_dir, out=out_dir, to=to, model=model, source_bytes=weights, seconds=seconds)


def _source_config(source: Path) -> dict[str, Any]:
    """config.json of a checkpoint that can be converted without running code of its own."""
    if (source / directory.MODEL_XML).exists():
        raise _no_source(f"{source} is already an OpenVINO model", fix="name it as `source` in neaptide.yaml as it is")
    for file, why in (
        ("config.json", "it tells the architecture"),
        ("tokenizer.json", "the replica turns text into tokens with it; slow tokenizers are not read"),
    ):
        if not (source / file).is_file():
            fix = "name the directory of a Hugging Face checkpoint (save_pretrained of model and tokenizer)"
            raise _no_source(f"{source / file} is missing", why=why, fix=fix)
    if not any(source.glob("*.safetensors")):
        fix = "save it again with save_pretrained(..., safe_serialization=True)"
        raise _no_source(f"{source} holds no *.safetensors", why="pickled weights can run code", fix=fix)
    try:
        config = msgspec.json.decode((source / "config.json").read_bytes(), type=dict[str, Any])
    except ValueError as e:
        raise _no_source(f"{source / 'config.json'} is not a JSON object", why=str(e), fix="copy it again") from e
    if "auto_map" in config:
        why = "its config.json has auto_map: loading it would run code from the checkpoint"
        raise _no_source(
            f"{source} needs remote code", why=why, fix="use a model whose architecture transformers knows"
        )
    return config


def _target_usable(out: Path, to: str, source_bytes: int) -> None:
    if to not in get_args(Precision):
        raise ModelError(f"{to!r} is not a precision", fix=f"--to {' | '.join(get_args(Precision))}", code="E211")
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out} exists already", fix="name another directory, or remove this one", code="E211")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ModelError(f"{out.parent} cannot be made: {e}", fix="name a directory you can write", code="E211") from e
    free, need = shutil.disk_usage(out.parent).free, int(source_bytes * SHARE[to])
    if free < need:
        raise ModelError(
            f"{out.parent} has {free >> 20} MiB free, the result needs about {need >> 20} MiB",
            fix="free some space, or name a directory on another disk",
            code="E212",
        )


def _stage(source: Path, staged: Path, config: dict[str, Any], to: Precision) -> None:
    """Links to the source's files beside a config.json of ours: for bf16 it names the dtype that is exported."""
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (staged / file.name).symlink_to(file)
    dtype = {"dtype": "bfloat16"} if to == "bf16" else {}
    kept = {k: v for k, v in config.items() if not (dtype and k == "torch_dtype")}
    (staged / "config.json").write_text(json.dumps({**kept, **dtype}, indent=2))


def _group_size(config: dict[str, Any]) -> int:
    """Weights that share a scale: 128, or the largest power of two below it that divides every matrix's input width
    (the compressor refuses others)."""
    text = config.get("text_config")
    shape = {**config, **text} if isinstance(text, dict) else config
    hidden = shape.get("hidden_size") or 128
    attention = (shape.get("head_dim") or 0) * (shape.get("num_attention_heads") or 0) or hidden
    widths = (hidden, attention, shape.get("intermediate_size") or hidden)
    return next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if all(width % size == 0 for width in widths))


def _checked(out: Path, tools: Toolchain, to: Precision, report: Report) -> ModelDir:
    for pattern in NOT_THE_MODEL:
        for file in out.glob(pattern):
            file.unlink()
    model = directory.read(out)
    if model.precision != to:
        raise _failed(f"the export gave {model.precision} weights instead of {to}", "")
    report("checking that the result loads")
    _must(tools.check_argv(out), "the result does not load", report)
    return model


def _must(argv: list[str], what: str, report: Report) -> None:
    code, last = run(argv, report)
    if code != 0:
        raise _failed(what, last or f"{argv[0]} ended with {code}")


def _clear_abandoned(out: Path) -> None:
    """Work directories of conversions to the same place whose process is gone."""
    for left in out.parent.glob(f".{out.name}.converting-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


def _failed(what: str, why: str) -> ModelError:
    fix = "the lines above name the cause; architectures are listed in optimum-intel's documentation"
    return ModelError(what, why=why, fix=fix, code="E208")


def _no_source(what: str, *, why: str = "", fix: str) -> ModelError:
    return ModelError(what, why=why, fix=fix, code="E203")
