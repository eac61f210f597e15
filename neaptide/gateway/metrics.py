"""Counters and histograms of one gateway, in plain lists; text is made at scrape time.

`observe` is a bisect and two additions (0.11 us; a metrics library's labelled observe costs 1.7 us). Labels come from
the table and from small fixed sets, never from what a client sent. Names follow vLLM where the meaning is the same, so
that dashboards and autoscalers written for it read the gateway too; what vLLM has no name for is `neaptide_`.
"""

from __future__ import annotations

from collections.abc import Iterable

from neaptide.observe.histogram import Histogram
from neaptide.types import Usage

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class ModelMetrics:
    """One deployment's. `ends` counts rows by (status, outcome, error slug, finish reason)."""

    __slots__ = (
        "arrivals",
        "cached",
        "copies",
        "degraded",
        "denied",
        "done",
        "e2e",
        "ends",
        "errors",
        "held_s",
        "late",
        "output",
        "prompt",
        "queue",
        "resumes",
        "retries",
        "served",
        "slo_ttft_s",
        "tpot",
        "ttft",
    )

    def __init__(self) -> None:
        self.arrivals = self.done = self.errors = self.retries = self.resumes = self.denied = 0
        self.prompt = self.cached = self.output = self.late = self.served = 0
        self.held_s = 0.0  # of those served
        self.slo_ttft_s = 1.0
        self.ends: dict[tuple[int, str, str, str], int] = {}
        self.degraded: dict[str, int] = {}  # what was done under pressure, by how
        self.copies: dict[str, int] = {}  # answers from the cache, by how; the other counters know nothing of them
        self.ttft, self.e2e, self.queue = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)
        self.tpot = Histogram(TOKEN_SECONDS)

    def count(self, usage: Usage) -> None:
        """A request is over."""
        end = (usage.status, usage.outcome, usage.error, usage.finish)
        self.ends[end] = self.ends.get(end, 0) + 1
        if usage.cache:  # it took no replica: counted with the others it would tell of capacity that is not there
            self.copies[usage.cache] = self.copies.get(usage.cache, 0) + 1
            return
        self.done += 1
        self.e2e.observe(usage.duration_s)
        self.queue.observe(usage.queued_s)
        self.prompt += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.output += usage.output_tokens
        if usage.ttft_s:
            self.ttft.observe(usage.ttft_s)
            if usage.tpot_s:
                self.tpot.observe(usage.tpot_s)
        if usage.outcome == "ok":
            self.served += 1
            self.held_s += usage.duration_s - usage.queued_s
            self.late += (usage.ttft_s or usage.queued_s) > self.slo_ttft_s
        else:
            self._count_failed(usage)

    def _count_failed(self, usage: Usage) -> None:
        """Late is what we made wait or failed; not what the client asked wrongly or left in time."""
        failed = usage.outcome in ("error", "timeout")
        self.errors += failed
        waited_s = usage.ttft_s or usage.duration_s
        left_waiting = usage.outcome == "aborted" and waited_s > self.slo_ttft_s
        self.late += failed or left_waiting or usage.status == 429

    def by(self, *fields: int) -> dict[tuple[str, ...], int]:
        """Ends summed over all but these fields of their key."""
        out: dict[tuple[str, ...], int] = {}
        for end, n in self.ends.items():
            kept = tuple(str(end[i]) for i in fields)
            out[kept] = out.get(kept, 0) + n
        return out


class Metrics:
    """All of a gateway's counters. `model("")` is where requests without a known model are counted."""

    __slots__ = ("_models", "refused", "version")

    def __init__(self, version: str = "") -> None:
        self.version = version
        self._models: dict[str, ModelMetrics] = {}
        self.refused: dict[str, int] = {}  # requests that never got to a model: parse errors, keys, paths

    def model(self, name: str) -> ModelMetrics:
        found = self._models.get(name)
        if found is None:
            found = self._models[name] = ModelMetrics()
        return found

    def refuse(self, slug: str) -> None:
        self.refused[slug] = self.refused.get(slug, 0) + 1

    def render(self, gauges: Iterable[tuple[str, str, str, float]]) -> bytes:
        """The exposition text. `gauges`: (name, help, labels, value) read at this moment; rows of a name together."""
        out: list[str] = []
        _family(out, "neaptide_build_info", "gauge", "The gateway's version.")
        out.append(f'neaptide_build_info{{version="{escape(self.version)}"}} 1')
        last = ""
        for name, text, labels, value in gauges:
            if name != last:
                _family(out, name, "gauge", text)
                last = name
            out.append(f"{name}{{{labels}}} {value:g}" if labels else f"{name} {value:g}")
        self._counters(out)
        self._histograms(out)
        return ("\n".join(out) + "\n").encode()

    def _counters(self, out: list[str]) -> None:
        for name, text, field in _COUNTERS:
            _family(out, name, "counter", text)
            out += [f'{name}{{model_name="{escape(m)}"}} {getattr(x, field)}' for m, x in self._models.items()]
        for name, text, labels, fields in _ENDS:
            _family(out, name, "counter", text)
            for m, x in self._models.items():
                for values, n in x.by(*fields).items():
                    if name == "vllm:request_success_total" and values[1] != "ok":
                        continue
                    pairs = ",".join(f'{k}="{escape(v)}"' for k, v in zip(labels, values))
                    out.append(f'{name}{{model_name="{escape(m)}",{pairs}}} {n}')
        for name, text, field in _BY_HOW:
            _family(out, name, "counter", text)
            for m, x in self._models.items():
                by: dict[str, int] = getattr(x, field)
                out += [f'{name}{{model_name="{escape(m)}",how="{how}"}} {n}' for how, n in by.items()]
        _family(out, "neaptide_refused_total", "counter", "Requests refused before a model was known, by reason.")
        out += [f'neaptide_refused_total{{reason="{escape(slug)}"}} {n}' for slug, n in self.refused.items()]

    def _histograms(self, out: list[str]) -> None:
        for name, text, field in _HISTOGRAMS:
            _family(out, name, "histogram", text)
            for m, x in self._models.items():
                histogram: Histogram = getattr(x, field)
                out += histogram.lines(name, f'model_name="{escape(m)}"')


_COUNTERS = (
    ("neaptide_arrivals_total", "Requests for a model, counted at arrival; not those the cache answered.", "arrivals"),
    ("neaptide_done_total", "Requests that ended, however; not those the cache answered.", "done"),
    ("neaptide_errors_total", "Requests that the replica or the gateway failed.", "errors"),
    ("neaptide_late_total", "Requests without a first token within the SLO.", "late"),
    ("neaptide_retries_total", "Requests sent again to a replica.", "retries"),
    ("neaptide_retries_denied_total", "Requests not sent again: retries were at their budget.", "denied"),
    ("neaptide_resumes_total", "Answers that went on elsewhere when their replica was lost.", "resumes"),
    ("vllm:prompt_tokens_total", "Prompt tokens.", "prompt"),
    ("neaptide_cached_tokens_total", "Prompt tokens served from a prefix cache.", "cached"),
    ("vllm:generation_tokens_total", "Generated tokens.", "output"),
)
_BY_HOW = (
    ("neaptide_cache_answers_total", "Answers that another request brought, by how.", "copies"),
    ("neaptide_degraded_total", "Requests that were made less under pressure, or refused, by how.", "degraded"),
)
_STATUS, _OUTCOME, _ERROR, _FINISH = range(4)  # places in a key of `ends`
_ENDS = (
    ("vllm:request_success_total", "Answers that ended well.", ("finished_reason",), (_FINISH, _OUTCOME)),
    ("neaptide_requests_total", "Answers by HTTP status; 0: none was sent.", ("code",), (_STATUS,)),
    ("neaptide_outcomes_total", "Rows by outcome and error.", ("outcome", "error"), (_OUTCOME, _ERROR)),
)
_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "From arrival to the first token.", "ttft"),
    ("vllm:time_per_output_token_seconds", "Mean time between tokens of a request.", "tpot"),
    ("vllm:e2e_request_latency_seconds", "From arrival to the last byte.", "e2e"),
    ("vllm:request_queue_time_seconds", "Wait in the gateway.", "queue"),
)


def _family(out: list[str], name: str, kind: str, text: str) -> None:
    out += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")


def escape(value: str) -> str:
    """A label value."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
