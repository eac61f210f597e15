"""An OpenVINO model directory: what it must hold, and what we read of it before an engine is started.

Strict, because a directory that is found broken here costs a sentence, and found broken in a replica costs a restart
loop. Weights are not read: their sizes are checked, their content is hashed only when somebody asks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from neaptide.errors import ModelError

MODEL_XML, MODEL_BIN = "openvino_model.xml", "openvino_model.bin"
REQUIRED = (MODEL_XML, MODEL_BIN, "tokenizer.json", "config.json")
MAX_JSON_BYTES = 64 << 20  # the largest tokenizer.json seen is 33 MB
MAX_TEMPLATE_CHARS = 256 << 10
SMALL_BYTES = 1 << 20  # files up to this size count into the digest with their content, larger ones with samples
SAMPLES, SAMPLE_BYTES = 16, 64 << 10  # spread over a file: a model trained on differs everywhere
MODE = re.compile(rb'<mode value="(int8|int4|nf4|mxfp4|e2m1|cb4)')
CONSTANT = re.compile(rb'<data element_type="(bf16|f16|f32)"')


class ModelDir(msgspec.Struct, frozen=True, kw_only=True):
    """A checked model directory. `digest` tells directories apart cheaply (names, sizes, content of small files and
    samples of large ones); `content_digest()` reads all of the weights."""

    path: Path
    name: str
    digest: str  # sha256, hex
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    bos_token: str  # as chat templates write it; "" if there is none
    eos_token: str
    chat_template: str | None
    layers: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    precision: str  # int8 | int4 | bf16 | f16 | f32 | ...

    def kv_bytes_per_token(self, element_bytes: float = 2.0) -> float:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    def content_digest(self) -> str:
        """sha256 over every file's name and content, in name order; reads the whole directory."""
        digest = hashlib.sha256()
        for file in files(self.path):
            with file.open("rb") as content:
                inner = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.name}\0{inner}\n".encode())
        return digest.hexdigest()


def read(path: Path, name: str | None = None) -> ModelDir:
    """The checked directory; ModelError (E201-E203) names the file and the fix."""
    _complete(path)
    config = _json(path / "config.json")
    text = config.get("text_config")
    shape = {**config, **text} if isinstance(text, dict) else config
    tokenizer = _json(path / "tokenizer_config.json", {})
    generation = _json(path / "generation_config.json", {})
    heads = _count(path, shape, "num_attention_heads")
    vocab_size = _count(path, shape, "vocab_size")
    return ModelDir(
        path=path,
        name=name or path.name,
        digest=_digest(path),
        context_tokens=_count(path, shape, "max_position_embeddings"),
        vocab_size=vocab_size,
        eos_token_ids=_eos(path, vocab_size, generation, shape),
        bos_token_id=_token_id(path, "bos_token_id", generation.get("bos_token_id", shape.get("bos_token_id"))),
        bos_token=_token(tokenizer.get("bos_token")),
        eos_token=_token(tokenizer.get("eos_token")),
        chat_template=_template(path, tokenizer),
        layers=_count(path, shape, "num_hidden_layers"),
        kv_heads=_count(path, shape, "num_key_value_heads", heads),
        head_dim=_count(path, shape, "head_dim", _count(path, shape, "hidden_size") // heads),
        weight_bytes=(path / MODEL_BIN).stat().st_size,
        precision=_precision(path / MODEL_XML),
    )


def is_hugging_face(path: Path) -> bool:
    """A Hugging Face checkpoint that was not converted: config.json and weights, no OpenVINO model."""
    weights = any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    return (path / "config.json").is_file() and weights and not (path / MODEL_XML).exists()


def _complete(path: Path) -> None:
    if not path.is_dir():
        what = f"{path} is not a directory" if path.exists() else f"{path} does not exist"
        raise ModelError(
            what,
            why="a model's source is a directory, a Hugging Face id (org/name) or nothing for the built-in guide",
            fix="correct `source` of the model in neaptide.yaml",
            code="E201",
        )
    if is_hugging_face(path):
        raise ModelError(
            f"{path} is a Hugging Face checkpoint, not an OpenVINO model",
            why=f"{MODEL_XML} is missing; the openvino engine reads converted models",
            fix=f"neaptide models convert {path} --to int8, then name the directory it prints as `source`",
            code="E203",
        )
    for file in REQUIRED:
        if not (path / file).is_file():
            raise _broken(path / file, "is missing", f"a model directory holds {', '.join(REQUIRED)}")
        if (path / file).stat().st_size == 0:
            raise _broken(path / file, "is empty", "a copy or download was cut off")
    _whole_xml(path / MODEL_XML)
    _json(path / "tokenizer.json")


def _whole_xml(path: Path) -> None:
    with path.open("rb") as xml:
        head = xml.read(512)
        xml.seek(max(0, path.stat().st_size - 64))
        tail = xml.read()
    if b"<net" not in head:
        raise _broken(path, "is not an OpenVINO model", "it does not begin with <net>")
    if not tail.rstrip().endswith(b"</net>"):
        raise _broken(path, "is cut off", "it does not end with </net>")


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in the file; `default` if the file may be missing."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _broken(path, "is too large", f"at most {MAX_JSON_BYTES >> 20} MiB are read")
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        if default is None:
            raise _broken(path, "is missing", f"a model directory holds {', '.join(REQUIRED)}") from None
        return default
    except ValueError as e:
        raise _broken(path, "is not JSON", str(e)) from e
    except OSError as e:
        raise _broken(path, "cannot be read", str(e)) from e
    if not isinstance(value, dict):
        raise _broken(path, "is not a JSON object", f"it holds a {type(value).__name__}")
    return value


def _count(path: Path, shape: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive number of config.json."""
    value = shape.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _broken(
            path / "config.json", f"has no usable {key}", f"a number above 0 was expected, it holds {value!r}"
        )
    return value


def _token_id(path: Path, key: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _broken(path / "config.json", f"has no usable {key}", f"a token id was expected, it holds {value!r}")
    return value


def _eos(path: Path, vocab_size: int, generation: dict[str, Any], shape: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers: chat models add their end of turn there."""
    value = generation.get("eos_token_id", shape.get("eos_token_id"))
    listed = value if isinstance(value, list) else [value]
    ids = [i for item in listed if (i := _token_id(path, "eos_token_id", item)) is not None]
    if not ids:
        raise _broken(path / "config.json", "has no eos_token_id", "without one no answer would end")
    if max(ids) >= vocab_size:
        raise _broken(path / "config.json", f"has eos_token_id {max(ids)}", f"the vocabulary ends at {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _token(value: object) -> str:
    """A special token of tokenizer_config.json: a string, or an object that holds one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _template(path: Path, tokenizer: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's; of several named ones the default."""
    file = path / "chat_template.jinja"
    value: object = tokenizer.get("chat_template")
    if file.is_file():
        try:
            value = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise _broken(file, "cannot be read", str(e)) from e
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = named.get("default")
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEMPLATE_CHARS:
        raise _broken(
            file, "is no usable chat template", f"text of at most {MAX_TEMPLATE_CHARS} characters was expected"
        )
    return value


def _precision(xml: Path) -> str:
    """The weights' precision: the compression mode in the model's runtime info, else its widest-spread constants."""
    with xml.open("rb") as content:
        content.seek(max(0, xml.stat().st_size - (64 << 10)))
        mode = MODE.search(content.read())
        if mode:
            return mode.group(1).decode()
        content.seek(0)
        kinds = [m.group(1).decode() for m in CONSTANT.finditer(content.read(16 << 20))]
    # f32 constants occur in every model (scales, epsilons), so a 16-bit kind counts wherever it appears.
    return next((kind for kind in ("bf16", "f16", "f32") if kind in kinds), "f32")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(1, size // SAMPLES) if size > SMALL_BYTES else SMALL_BYTES):
                content.seek(start)
                digest.update(content.read(SAMPLE_BYTES if size > SMALL_BYTES else SMALL_BYTES))
    return digest.hexdigest()


def files(path: Path) -> Iterator[Path]:
    """The model's files in name order; notes (README) and hidden files are not the model."""
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".md":
            yield file


def _broken(path: Path, state: str, why: str) -> ModelError:
    return ModelError(
        f"{path} {state}",
        why=why,
        fix=f"copy or convert {path.parent.name} again, or name another `source`",
        code="E202",
    )
