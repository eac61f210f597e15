"""Parquet files, by pyarrow: the only place that knows it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Labels, Lists
from neaptide.simulate.columns import MOST_ROWS, Columns, too_many


def read_parquet(path: Path, wanted: Collection[str]) -> tuple[tuple[str, ...], Columns]:
    """The names of all columns, and those wanted: numbers as float64 (null: NaN), text as Labels, lists of integers as
    Lists. ConfigError E123 without pyarrow, E120 for a file it cannot read, E121 for a column of another kind."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as e:
        raise ConfigError(
            f"{path} is a Parquet file", why="pyarrow is not installed", code="E123",
            fix="pip install 'neaptide[simulate]'",
        ) from e  # fmt: skip

    def column(name: str, values: Any) -> Any:
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return values.cast(pa.float64(), safe=False).to_numpy()
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            coded = values.cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
            return Labels(tuple(coded.dictionary.to_pylist()), coded.indices.to_numpy().astype(np.int64))
        if pa.types.is_list(kind) and pa.types.is_integer(kind.value_type):
            lists = values.fill_null([]).combine_chunks()
            starts = np.concatenate(([0], np.cumsum(lists.value_lengths().to_numpy()))).astype(np.int64)
            inner = lists.flatten()
            if inner.null_count:
                raise ConfigError(f"{path}: a list in column {name} has a null", code="E121", fix="leave it out")
            return Lists(inner.to_numpy().astype(np.int64), starts)
        raise ConfigError(f"{path}: column {name} is of type {kind}", code="E121", fix="write numbers or text")

    try:
        with pq.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            if file.metadata.num_rows > MOST_ROWS:
                raise too_many(path)
            table = file.read(columns=[n for n in names if n in wanted])
        return names, {n: column(n, table[n]) for n in table.column_names}
    except (OSError, KeyError, ValueError, pa.ArrowException) as e:
        raise ConfigError(f"{path} is not a sound Parquet file", why=str(e), code="E120", fix="copy it again") from e
