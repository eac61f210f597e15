"""Sentences as vectors, by a graph built from weights: a tiny BERT made here, beside the same sums in numpy."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from neaptide.cache.minilm import MiniLM, find, read_safetensors
from neaptide.errors import ConfigError

WORDS = ["[UNK]", "[CLS]", "[SEP]", "how", "do", "i", "reset", "my", "password", "please", "boil", "an", "egg"]
LAYERS, SIZE, HEADS, INNER, PLACES = 2, 16, 4, 32, 12
CONFIG = {
    "hidden_size": SIZE,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": PLACES,
    "layer_norm_eps": 1e-12,
}
Tensors = dict[str, npt.NDArray[Any]]
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="the extra `semantic`")


def random_weights() -> Tensors:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS), SIZE),
        "embeddings.position_embeddings.weight": (PLACES, SIZE),
        "embeddings.token_type_embeddings.weight": (2, SIZE),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        linear = {f"attention.self.{part}": (SIZE, SIZE) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (SIZE, SIZE)}
        linear |= {"intermediate.dense": (INNER, SIZE), "output.dense": (SIZE, INNER)}
        shapes |= {f"{at}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in linear.items()}
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    shapes |= {f"{name}.{part}": (SIZE,) for name in norms for part in ("weight", "bias")}
    return {name: rng.normal(0, 0.7, shape).astype(np.float32) for name, shape in shapes.items()}


def safetensors(tensors: Tensors, path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        kind = {"float32": "F32", "int64": "I64"}[tensor.dtype.name]
        end = len(data) + tensor.nbytes
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.tobytes()
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data)


def bert(folder: Path, tensors: Tensors) -> Path:
    """A directory as Hugging Face has it."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    safetensors({**tensors, "embeddings.position_ids": np.arange(PLACES)[None]}, folder / "model.safetensors")
    return folder


def plain(tensors: Tensors, text: str) -> npt.NDArray[np.float64]:
    """One sentence in float64, as the paper writes it: no batch, no mask."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def linear(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return np.asarray(scaled * w[f"{name}.weight"] + w[f"{name}.bias"])

    ids = [1, *(WORDS.index(word) for word in text.split()), 2]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (linear(x, f"{at}.attention.self.{part}") for part in ("query", "key", "value"))
        heads = []
        for part in np.split(np.arange(SIZE), HEADS):
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(SIZE / HEADS))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        x = norm(
            x + linear(np.concatenate(heads, -1), f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
        )
        inner = linear(x, f"{at}.intermediate.dense")
        inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


TEXTS = ("how do i reset my password", "egg", "please boil an egg")


@needs_openvino
def test_the_graph_computes_what_plain_sums_do(tmp_path: Path) -> None:
    tensors = random_weights()
    found = MiniLM(bert(tmp_path, tensors)).embed(TEXTS)
    assert found.shape == (len(TEXTS), SIZE)
    np.testing.assert_allclose(found, [plain(tensors, text) for text in TEXTS], atol=1e-4)


@needs_openvino
def test_who_stands_beside_a_sentence_does_not_change_its_vector(tmp_path: Path) -> None:
    # Given a short sentence beside longer ones, which pad it, when it is embedded alone, then it is the same.
    model = MiniLM(bert(tmp_path, random_weights()))
    together = model.embed(TEXTS)
    np.testing.assert_allclose(together[1], model.embed([TEXTS[1]])[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)


@needs_openvino
def test_a_text_longer_than_the_model_reads_is_cut_and_none_is_none(tmp_path: Path) -> None:
    model = MiniLM(bert(tmp_path, random_weights()))
    long = " ".join(["egg"] * 500)
    np.testing.assert_allclose(model.embed([long]), model.embed([" ".join(["egg"] * (PLACES - 2))]), atol=1e-5)
    assert model.embed([]).shape == (0, SIZE)


@needs_openvino
def test_a_missing_weight_is_named_with_the_remedy(tmp_path: Path) -> None:
    tensors = random_weights()
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ConfigError, match=r"encoder\.layer\.1\.output\.dense\.bias") as caught:
        MiniLM(bert(tmp_path, tensors))
    assert "all-MiniLM-L6-v2" in caught.value.fix


@needs_openvino
def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = random_weights()
    tensors["encoder.layer.0.output.dense.weight"] = np.zeros((3, 5), np.float32)
    with pytest.raises(ConfigError, match="no BERT"):
        MiniLM(bert(tmp_path, tensors))


def test_weights_that_are_not_there_are_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json") as caught:
        find(str(tmp_path))
    assert "embedder" in caught.value.fix


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = random_weights()
    read = read_safetensors(bert(tmp_path, tensors) / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def about(**changed: Any) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}).encode()


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (about(), 1 << 62),  # would be read into memory
        (about(), 9000),  # cut short
        (b"[1, 2]", None),
        (b"{" * 1000, None),
        (b'{"w": 3}', None),
        (b"\xff\xfe", None),
        (about(data_offsets=[0, 800]), None),
        (about(data_offsets=[-8, 8]), None),
        (about(data_offsets=[8, 0]), None),
        (about(data_offsets=[0, 7]), None),
        (about(data_offsets=[0]), None),
        (about(data_offsets="all"), None),
        (about(shape=[3]), None),
        (about(shape=[-1]), None),
        (about(shape=[1 << 40, 1 << 40]), None),
        (about(shape=None), None),
        (b'{"w": {"dtype": "F32"}}', None),
    ],
)
def test_a_file_that_lies_about_itself_is_refused(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(8))
    with pytest.raises(ConfigError, match="no whole safetensors file"):
        read_safetensors(path)


def test_a_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(ConfigError, match="no whole safetensors file"):
        read_safetensors(path)
