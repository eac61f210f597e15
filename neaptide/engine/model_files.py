"""What an OpenVINO model directory says of itself, read before anything heavy is loaded.

Needed: openvino_model.xml and .bin, config.json; generation_config.json where the end-of-sequence ids differ from
config.json's. No openvino_tokenizer.xml: engines take and give token ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from neaptide.errors import ModelError

BLOCK_TOKENS = 32  # of the CPU plugin's paged attention; cache_bytes_a_block was checked against its report
MODEL, WEIGHTS, CONFIG, GENERATION = "openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json"


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    directory: str
    weights_bytes: int
    changed_ns: int  # newest mtime of model and weights: a calibration's key
    context_tokens: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    eos_ids: frozenset[int]

    @property
    def kv_block_bytes(self) -> int:
        """KV memory of a block in all layers, 8-bit: keys scaled by channel (one f32 scale and zero point a channel and
        block), values by token."""
        keys = BLOCK_TOKENS * self.head_dim + 8 * self.head_dim
        values = BLOCK_TOKENS * (self.head_dim + 8)
        return self.layers * self.kv_heads * (keys + values)


def read(directory: str) -> ModelFiles:
    """ModelError naming the file that is missing or unreadable, and the way to get it."""
    root = Path(directory)
    for name in (MODEL, WEIGHTS, CONFIG):
        if not (root / name).is_file():
            raise ModelError(
                f"{root / name} is missing",
                why="an OpenVINO model directory holds openvino_model.xml, openvino_model.bin and config.json",
                fix=CONVERT,
                code="E201",
            )
    config = _json(root / CONFIG)
    text = config.get("text_config", config)  # multimodal models nest the language model's
    generation = _json(root / GENERATION) if (root / GENERATION).is_file() else {}
    try:
        heads = int(text["num_attention_heads"])
        return ModelFiles(
            directory=directory,
            weights_bytes=(root / WEIGHTS).stat().st_size,
            changed_ns=max((root / name).stat().st_mtime_ns for name in (MODEL, WEIGHTS)),
            context_tokens=int(text["max_position_embeddings"]),
            vocab_size=int(text["vocab_size"]),
            layers=int(text["num_hidden_layers"]),
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
            eos_ids=_ids(generation.get("eos_token_id")) or _ids(text.get("eos_token_id")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{root / CONFIG} cannot be understood: {error!r}",
            why="it must hold a decoder's num_hidden_layers, num_attention_heads, hidden_size, vocab_size and "
            "max_position_embeddings",
            fix=CONVERT,
            code="E202",
        ) from error


CONVERT = (
    "convert the model again: optimum-cli export openvino --task text-generation-with-past --weight-format int8 "
    "-m MODEL DIRECTORY"
)


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ModelError(
            f"{path} is not JSON: {error}", why="it is part of the model", fix=CONVERT, code="E202"
        ) from error


def _ids(value: object) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in value) if isinstance(value, list) else frozenset({int(str(value))})
