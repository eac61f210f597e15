"""How busy GPUs are, as an exporter beside them tells (docs/decisions/0034)."""

from __future__ import annotations

import math

from neaptide.config import GpuSource
from neaptide.errors import UnreachableError
from neaptide.observe.exposition import Sample, samples
from neaptide.observe.fetch import FetchError, get

ANSWER_S = 3.0  # dcgm-exporter answers from memory
MOST_BYTES = 4 << 20  # 16 GPUs x 100 fields x 300 bytes, labels of a pod included, are 480 KB
SLACK = 1.01  # a share that was measured over an interval may be a little past 1


async def read(source: GpuSource) -> tuple[float, ...]:
    """The use of each GPU that is meant, 0 to 1, at least one. UnreachableError E405 says what is wrong, and where."""
    try:
        raw = await get(source.url, timeout_s=ANSWER_S, most_bytes=MOST_BYTES)
        return shares(raw.decode(), source)
    except FetchError as e:
        fix = "see that the exporter runs and may be reached from here, or correct its url under gpus"
        raise _untold(source, str(e), fix) from e
    except ValueError as e:  # no UTF-8, or not the format
        fix = "name the page that Prometheus would read, which most exporters have at /metrics"
        raise _untold(source, str(e), fix) from e


def shares(text: str, source: GpuSource) -> tuple[float, ...]:
    """As `read`, of the exporter's text. ValueError where it is not in the format."""
    found = [s for s in samples(text, source.metric) if source.labels.items() <= s.labels.items()]
    told = [s for s in found if not math.isnan(s.value)]
    if not told:
        labels = "".join(f" {k}={v!r}" for k, v in source.labels.items())
        fix = "look at its page for the metric's name and labels, and correct metric and labels under gpus"
        raise _untold(source, f"it tells no value of {source.metric}{' with' if labels else ''}{labels}", fix)
    return tuple(_share(s, source) for s in told)


def _share(sample: Sample, source: GpuSource) -> float:
    share = sample.value / source.full_use
    if not 0 <= share <= SLACK:
        fix = f"give full under gpus: the value of {source.metric} at full use"
        raise _untold(source, f"{source.metric} is {sample.value:g}, outside 0 to {source.full_use:g}", fix)
    return min(1.0, share)


def _untold(source: GpuSource, why: str, fix: str) -> UnreachableError:
    return UnreachableError(f"{source.url} does not tell how busy its GPUs are: {why}", fix=fix, code="E405")
