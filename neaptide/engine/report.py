"""A replica's counters and their Prometheus text, in vLLM's names, so that its dashboards and endpoint pickers work.

Plain lists on the hot path (a bisect and an addition, 0.2 us), rendered at scrape.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from statistics import median

from neaptide.engine.protocol import Description
from neaptide.engine.requests import Job
from neaptide.link import LoadReport
from neaptide.observe.histogram import Histogram
from neaptide.types import Steps

TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
RECENT_STEPS = 101
STEP_KEPT = 0.9995  # of the sums at each step: about the last 2,000 steps count


class Meters:
    """What has happened since the start. Tokens of requests that stall or abort count as generated all the same."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generated_tokens = self.cached_tokens = self.queried_tokens = 0
        self.steps = 0
        self.ends: Counter[str] = Counter()
        self.ttft, self.queue, self.e2e = Histogram(REQUEST_S), Histogram(REQUEST_S), Histogram(REQUEST_S)
        self.itl, self.step_time = Histogram(TOKEN_S), Histogram(TOKEN_S)
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._median: float | None = 0.0
        self._n = self._batch = self._batch2 = self._step_s = self._batch_step_s = 0.0  # see steps_told

    def step(self, step_s: float, batch: int) -> None:
        self.steps += 1
        self.step_time.observe(step_s)
        if batch:
            self._recent.append(step_s)
            self._median = None
            self._n = self._n * STEP_KEPT + 1.0
            self._batch = self._batch * STEP_KEPT + batch
            self._batch2 = self._batch2 * STEP_KEPT + batch * batch
            self._step_s = self._step_s * STEP_KEPT + step_s
            self._batch_step_s = self._batch_step_s * STEP_KEPT + batch * step_s

    def steps_told(self) -> Steps:
        return Steps(
            n=self._n,
            batch=self._batch,
            batch2=self._batch2,
            step_s=self._step_s,
            batch_step_s=self._batch_step_s,
        )

    def median_step_s(self) -> float:
        if self._median is None:
            self._median = median(self._recent)
        return self._median

    def token(self, job: Job, now: float, count: int) -> None:
        """`count` tokens of `job` have come in one step; stamps its first and last token."""
        self.generated_tokens += count
        if job.last_s:
            self.itl.observe(now - job.last_s)
        else:
            job.first_s = now
            self.ttft.observe(now - job.arrived_s)
        job.last_s = now

    def ended(self, job: Job, finish: str, now: float) -> None:
        self.ends[finish] += 1
        if job.sent_s:
            self.prompt_tokens += job.prompt_tokens
            self.queried_tokens += job.prompt_tokens
            self.cached_tokens += job.cached_tokens
            self.queue.observe(job.queued_s)
            self.e2e.observe(now - job.arrived_s)

    def text(self, model: str, load: LoadReport, description: Description | None) -> str:
        """The Prometheus exposition format, version 0.0.4."""
        labels = f'model_name="{_escape(model)}"'
        lines: list[str] = []
        for name, value in (
            ("vllm:num_requests_running", load.running),
            ("vllm:num_requests_waiting", load.waiting),
            ("vllm:kv_cache_usage_perc", load.kv_usage),
            ("neaptide_replica_free_kv_tokens", load.free_kv_tokens),
            ("neaptide_replica_free_slots", load.slots),
        ):
            lines += [f"# TYPE {name} gauge", f"{name}{{{labels}}} {value}"]
        for name, value in (
            ("vllm:prompt_tokens_total", self.prompt_tokens),
            ("vllm:generation_tokens_total", self.generated_tokens),
            ("vllm:prefix_cache_queries_total", self.queried_tokens),
            ("vllm:prefix_cache_hits_total", self.cached_tokens),
            ("neaptide_replica_steps_total", self.steps),
        ):
            lines += [f"# TYPE {name} counter", f"{name}{{{labels}}} {value}"]
        lines.append("# TYPE vllm:request_success_total counter")
        for finish in ("stop", "length", "abort", "error"):
            lines.append(f'vllm:request_success_total{{{labels},finished_reason="{finish}"}} {self.ends[finish]}')
        for name, histogram in (
            ("vllm:time_to_first_token_seconds", self.ttft),
            ("vllm:inter_token_latency_seconds", self.itl),
            ("vllm:e2e_request_latency_seconds", self.e2e),
            ("vllm:request_queue_time_seconds", self.queue),
            ("neaptide_replica_step_seconds", self.step_time),
        ):
            lines += (f"# TYPE {name} histogram", *histogram.lines(name, labels))
        return "\n".join([*lines, *_cache_config(labels, description)]) + "\n"


def joined(texts: Iterable[str]) -> str:
    """Several models' expositions as one: the lines of a metric must stand together, under one TYPE."""
    families: dict[str, list[str]] = {}
    for text in texts:
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                lines = families.setdefault(line, [])
            else:
                lines.append(line)
    return "".join(f"{line}\n" for head, lines in families.items() for line in (head, *lines))


def _cache_config(labels: str, description: Description | None) -> list[str]:
    if description is None:
        return []
    block = description.kv_block_tokens
    facts = (
        f'block_size="{block}",num_gpu_blocks="{description.kv_tokens // block}",'
        f'enable_prefix_caching="{description.prefix_cache}"'
    )
    return ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{{{labels},{facts}}} 1"]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
