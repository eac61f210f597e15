"""GPU use: what exporters tell, asked over real connections, made into a signal that rules act on."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.clock import VirtualClock
from neaptide.config import GpuSource, ModelSettings, Settings, parse
from neaptide.control.decide import decide
from neaptide.control.desired import deployment
from neaptide.control.gpus import STALE_S, GpuWatch
from neaptide.control.reasons import sentence
from neaptide.control.signals import Heard, read
from neaptide.control.traits import Told
from neaptide.errors import UnreachableError
from neaptide.observe.exposition import samples
from neaptide.observe.fetch import FetchError, get
from neaptide.observe.gpus import read as read_source
from neaptide.observe.gpus import shares
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Carry, Choice, Replica, Snapshot
from tests.cli_run import cli
from tests.conftest import Service
from tests.traffic import wait_for

URL = "http://127.0.0.1:9/metrics"
DCGM = """\
# HELP DCGM_FI_DEV_SM_CLOCK SM clock frequency (in MHz).
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H200"} 139
# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H200"} 90
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H200"} 30
DCGM_FI_DEV_GPU_UTIL_SEEN{gpu="1"} 5
DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H200"} 0.870214
"""
ASCEND = """\
npu_chip_info_utilization{container_name="",id="0",model_name="910B"} 75 1723621883587
npu_chip_info_utilization{container_name="",id="1",model_name="910B"} 25 1723621883932
"""


# ------------------------------------------------------------------------------------------------ the text


def test_each_gpus_share_is_told_whatever_unit_its_metric_has() -> None:
    assert shares(DCGM, GpuSource(url=URL)) == (0.9, 0.3)
    assert shares(DCGM, GpuSource(url=URL, metric="DCGM_FI_PROF_GR_ENGINE_ACTIVE")) == (0.870214,)
    assert shares(ASCEND, GpuSource(url=URL, metric="npu_chip_info_utilization")) == (0.75, 0.25)
    assert shares("gpu_busy 3\n", GpuSource(url=URL, metric="gpu_busy", full=4)) == (0.75,)


def test_labels_choose_the_gpus_that_are_meant() -> None:
    assert shares(DCGM, GpuSource(url=URL, labels={"gpu": "1"})) == (0.3,)
    assert shares(DCGM, GpuSource(url=URL, labels={"gpu": "1", "device": "nvidia1"})) == (0.3,)


@pytest.mark.parametrize(
    ("text", "labels", "said"),
    [
        ("", {}, "no value of DCGM_FI_DEV_GPU_UTIL"),
        (DCGM, {"gpu": "7"}, "with gpu='7'"),
        ("DCGM_FI_DEV_GPU_UTIL NaN\n", {}, "no value of"),
        ('DCGM_FI_DEV_GPU_UTIL{gpu="0"} 9223372036854775794\n', {}, "outside 0 to 100"),  # what it writes for unknown
        ("DCGM_FI_DEV_GPU_UTIL -1\n", {}, "outside 0 to 100"),
        ("DCGM_FI_DEV_GPU_UTIL +Inf\n", {}, "outside 0 to 100"),
    ],
)
def test_what_is_missing_or_no_share_is_told_with_what_to_correct(text: str, labels: dict[str, str], said: str) -> None:
    with pytest.raises(UnreachableError, match="E405") as error:
        shares(text, GpuSource(url=URL, labels=labels))
    assert said in error.value.what
    assert "gpus" in error.value.fix


def test_a_gpu_that_is_not_known_leaves_the_others() -> None:
    assert shares('DCGM_FI_DEV_GPU_UTIL{gpu="0"} NaN\n' + DCGM, GpuSource(url=URL)) == (0.9, 0.3)


@pytest.mark.parametrize(
    "text",
    [
        "m{} 1\n",
        " m 1 \r\n",
        'm{a="1",} 1\n',
        '\tm { a = "1" , b = "}\\"," } 1 -5\n',
        'm{a="\u2028"} 1e0\n',
        "m 1.\nmm 7\nm:a 7\n# m x\nno sense at all\n",
    ],
)
def test_what_the_format_allows_is_read(text: str) -> None:
    assert [s.value for s in samples(text, "m")] == [1.0]


@pytest.mark.parametrize(
    "text",
    ["m 1", "m\n", "m one\n", "m 1_0\n", "m 1 2 3\n", "m 1 now\n", "m{a=1} 1\n", 'm{a="1} 1\n', 'm{a="1" b="2"} 1\n',
     'm{a="1",a="2"} 1\n', 'm{a="1"\n', 'm{a="\\x"} 1\n', "m{,} 1\n", "m 1\nm 2\n", "m ١\n", "m infinity\n"],
)  # fmt: skip
def test_what_is_cut_off_or_no_sample_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ends in the middle|no sample|stands twice"):
        samples(text, "m")


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), st.text()), st.floats(allow_nan=False))
def test_any_label_and_value_comes_back_as_it_was_written(labels: dict[str, str], value: float) -> None:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    pairs = ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items())
    told = str(value).replace("inf", "Inf")
    assert samples(f"m{{{pairs}}} {told}\n", "m") == [(labels, value)]


@given(st.text(alphabet='m{}a="\\,1 \n.eN'))
def test_no_text_brings_anything_but_samples_or_a_refusal(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert all(isinstance(s.value, float) for s in samples(text, "m"))


# ------------------------------------------------------------------------------------------------ the connection

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]
BODY = DCGM.encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


@contextlib.asynccontextmanager
async def exporter(answer: bytes, *, stays: bool = False, port: int = 0) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that reads a head, says `answer` and closes, or `stays` silent: (its URL, the heads it read)."""
    heads: list[bytes] = []
    over = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            await writer.drain()
            if stays:
                await over.wait()
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", port, reuse_address=True)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics", heads
    finally:
        over.set()
        server.close()


def chunked(body: bytes) -> bytes:
    pieces = [body[i : i + 100] for i in range(0, len(body), 100)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in [*pieces, b""])


@pytest.mark.parametrize(
    ("answer", "stays"),
    [
        (HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY), True),
        (HEAD + b"\r\n" + BODY, False),
        (HEAD.replace(b"1.1", b"1.0") + b"\r\n" + BODY, False),
    ],
)
def test_an_answer_is_read_however_its_end_is_told(answer: bytes, stays: bool) -> None:
    async def story() -> None:
        async with exporter(answer, stays=stays) as (url, heads):
            assert await read_source(GpuSource(url=url)) == (0.9, 0.3)
            assert heads[0].startswith(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("answer", "stays", "said"),
    [
        (b"", True, "no whole answer within 0.2 s"),
        (HEAD + b"Content-Length: 9\r\n\r\nhalf", True, "no whole answer within 0.2 s"),
        (b"", False, "broke before"),
        (HEAD + b"Content-Length: 9\r\n\r\nhalf", False, "broke before"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhalf", False, "broke before"),
        (HEAD + b"\r\n" + b"#" * 100_000, False, "longer than 20000 bytes"),
        (HEAD + b"X: y\r\n" * 10_000, True, "longer than 20000 bytes"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", True, "speaks no HTTP"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", True, "speaks no HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", True, "speaks no HTTP"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", True, "it answers 404"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", True, "it answers 302"),
    ],
)
def test_one_that_hangs_breaks_off_goes_on_for_ever_or_speaks_otherwise_is_refused(
    answer: bytes, stays: bool, said: str
) -> None:
    async def story() -> str:
        async with exporter(answer, stays=stays) as (url, _):
            with pytest.raises(FetchError) as error:
                await get(url, timeout_s=0.2 if "within" in said else 60, most_bytes=20_000)
            return str(error.value)

    assert said in asyncio.run(story())


def test_a_page_that_is_no_exporters_is_told_with_its_address() -> None:
    page = b"\x1f\x8b\x00not text"

    async def story() -> None:
        async with exporter(HEAD + b"Content-Length: %d\r\n\r\n" % len(page) + page) as (url, _):
            with pytest.raises(UnreachableError, match="E405") as error:
                await read_source(GpuSource(url=url))
            assert url in error.value.what
            assert "/metrics" in error.value.fix

    asyncio.run(story())


# ------------------------------------------------------------------------------------------------ the watch


class Exporters:
    """Shares by URL; a URL that is missing does not answer."""

    def __init__(self, **told: tuple[float, ...]) -> None:
        self.told = told

    async def ask(self, source: GpuSource) -> tuple[float, ...]:
        try:
            return self.told[source.url]
        except KeyError:
            raise UnreachableError(f"{source.url} does not answer", fix="start it", code="E405") from None


def of(*urls: str) -> ModelSettings:
    return ModelSettings(gpus=tuple(GpuSource(url=url) for url in urls))


def watching(exporters: Exporters, clock: VirtualClock, **models: str) -> GpuWatch:
    """A watch of models, each with the exporters in its words."""
    watch = GpuWatch(exporters.ask, clock)
    watch.configure({model: of(*urls.split()) for model, urls in models.items()})
    return watch


def test_a_models_use_is_the_mean_of_all_its_gpus_and_a_pools_of_its_models() -> None:
    async def story() -> None:
        watch = watching(Exporters(a=(0.9, 0.3), b=(0.0,), c=(0.8,)), VirtualClock(), m="a b", n="c", o="")
        assert math.isnan(watch.usage(["m"]))
        await watch.look()
        assert watch.usage(["m"]) == pytest.approx(0.4)
        assert watch.usage(["m", "n"]) == pytest.approx(0.5)
        assert math.isnan(watch.usage(["o"]))

    asyncio.run(story())


def test_what_was_told_holds_until_it_is_stale_and_the_others_are_the_mean_then() -> None:
    async def story() -> None:
        exporters, clock = Exporters(a=(1.0,), b=(0.5,)), VirtualClock()
        watch = watching(exporters, clock, m="a b")
        await watch.look()
        del exporters.told["a"]
        clock.advance(STALE_S)
        await watch.look()
        assert watch.usage(["m"]) == 0.75
        clock.advance(0.1)
        assert watch.usage(["m"]) == 0.5
        clock.advance(STALE_S)
        assert math.isnan(watch.usage(["m"]))

    asyncio.run(story())


def test_silence_is_said_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        exporters = Exporters()
        watch = watching(exporters, VirtualClock(), m="a")
        for told in (None, None, 0.5, 0.5, None):
            exporters.told = {"a": (told,)} if told is not None else {}
            await watch.look()

    with caplog.at_level(logging.WARNING, "neaptide.control"):
        asyncio.run(story())
    gone, back = "m: a does not answer; start it", "m: a tells how busy its GPUs are again"
    assert caplog.messages == [gone, back, gone]


def test_one_that_hangs_takes_no_others_turn() -> None:
    async def story() -> None:
        hung, other = asyncio.Event(), asyncio.Event()

        async def ask(source: GpuSource) -> tuple[float, ...]:
            await (hung if source.url == "a" else other).wait()
            return (0.6,)

        watch = GpuWatch(ask, VirtualClock())
        watch.configure({"m": of("a"), "n": of("b")})
        round = asyncio.create_task(watch.look())
        other.set()
        while math.isnan(watch.usage(["n"])):
            await asyncio.sleep(0)
        assert math.isnan(watch.usage(["m"]))
        hung.set()
        await round
        assert watch.usage(["m"]) == 0.6

    asyncio.run(story())


def test_a_source_that_is_configured_otherwise_is_forgotten_even_while_it_is_asked() -> None:
    async def story() -> None:
        clock, asked, go = VirtualClock(), asyncio.Event(), asyncio.Event()

        async def ask(source: GpuSource) -> tuple[float, ...]:
            asked.set()
            await go.wait()
            return (0.6,)

        watch = GpuWatch(ask, clock)
        watch.configure({"m": of("a")})
        round = asyncio.create_task(watch.look())
        await asked.wait()
        watch.configure({"m": of("b")})
        go.set()
        await round
        assert math.isnan(watch.usage(["m"]))
        await watch.look()
        assert watch.usage(["m"]) == 0.6
        watch.configure({"m": of("b")})
        assert watch.usage(["m"]) == 0.6
        watch.configure({})
        assert math.isnan(watch.usage(["m"]))

    asyncio.run(story())


def test_an_exporter_that_restarts_is_heard_again(caplog: pytest.LogCaptureFixture) -> None:
    answer = HEAD + b"\r\n" + BODY

    async def story() -> None:
        clock = VirtualClock()
        watch = GpuWatch(clock=clock)
        async with exporter(answer) as (url, _):
            watch.configure({"m": of(url)})
            await watch.look()
            assert watch.usage(["m"]) == pytest.approx(0.6)
        clock.advance(STALE_S + 1)
        await watch.look()
        assert math.isnan(watch.usage(["m"]))
        async with exporter(answer, port=int(url.split(":")[2].split("/")[0])):
            await watch.look()
        assert watch.usage(["m"]) == pytest.approx(0.6)

    asyncio.run(story())
    assert len(caplog.messages) == 2


# ------------------------------------------------------------------------------------------------ the decision

RULED = """
models:
  m:
    engine: echo
    gpus: [{{url: "{url}"}}]
    scale:
      max: 3
      policy: thresholds
      rules: [{{signal: gpu_usage, above: 0.8, for_s: {for_s}, cooldown_s: 3600}}]
"""


def ruled(url: str = URL, for_s: float = 10) -> Settings:
    return parse(RULED.format(url=url, for_s=for_s), "t")


def choices(usage: list[float]) -> list[Choice]:
    """The choice of each second, with GPUs so busy, of a model with one replica."""
    d = deployment("m", ruled().models["m"], "")
    one = Replica(id="m-0", deployment="m", revision=d.stable.id, state="ready", endpoint="")
    made, carry, heard = [], Carry(), Heard()
    for now_s, busy in enumerate(map(float, usage)):
        word = Gauges(gateway="g", mono_s=now_s, fast=1, slow=1, models={"m": ModelGauge()})
        loads, heard = read([word], heard, now_s, {"m": Told(gpu_usage=busy)})
        snapshot = Snapshot(now_s=now_s, now_wall_s=now_s, deployments=(d,), replicas=(one,), loads=loads)
        plan, carry = decide(snapshot, carry)
        made.append(plan.choices[0])
    return made


def test_busy_gpus_start_a_replica_once_they_were_for_long_enough_and_the_sentence_says_so() -> None:
    made = choices([math.nan] * 3 + [0.91] * 14)
    acted = next(i for i, c in enumerate(made) if c.action == "launch")
    assert acted == 13  # 10 s after the first word
    assert (made[acted].before, made[acted].after, made[acted].numbers["gpu_usage"]) == (1, 2, 0.91)
    assert "gpu_usage" not in made[0].numbers
    assert "adds 1 once gpu_usage is over 0.8 for 10 s (not told)" in made[1].sentence
    assert "adds 1 once gpu_usage is over 0.8 for 10 s (0.91 now)" in made[5].sentence
    assert "gpu_usage 高于 0.8，持续 10 秒（现在 0.91）" in sentence(made[5], "zh")


# ------------------------------------------------------------------------------------------------ the service


@pytest.fixture
def metrics() -> Iterator[str]:
    """The URL of a web server whose page is DCGM's with both GPUs busy."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(DCGM.replace("} 30", "} 100").encode())

        def log_message(self, format: str, *args: object) -> None:
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()


def test_a_service_follows_its_gpus_and_tells_how_busy_they_are(metrics: str, serve: Callable[..., Service]) -> None:
    service = serve(RULED.format(url=metrics, for_s=0))

    def row() -> dict[str, object]:
        return dict(json.loads(service.run("scale", "show", "--json").stdout)["rows"][0])

    wait_for(lambda: row()["ready"] == 2, "a second replica", 60.0)
    assert row()["gpu_usage"] == pytest.approx(0.95)
    assert "m: its GPUs are 95% busy" in service.run("scale", "show").stdout


def test_doctor_asks_every_exporter_and_says_which_does_not_tell(metrics: str, tmp_path: Path) -> None:
    config = tmp_path / "neaptide.yaml"
    remote = f'replicas: [{{url: "http://127.0.0.1:9/v1"}}], gpus: [{{url: "{metrics}"}}, {{url: "{URL}"}}]'
    config.write_text(f"models: {{big: {{{remote}}}}}\n")
    done = cli("doctor", "--json", "-f", str(config), "--state", str(tmp_path / "state"))
    told, untold = (c for c in json.loads(done.stdout)["checks"] if c["name"] == "gpus")
    assert (told["level"], told["text"]) == ("ok", f"big: GPUs at 90%, 100% by {metrics}")
    assert untold["level"] == "warn"
    assert untold["text"].startswith(f"big: [E405] {URL} does not tell")
    assert "url under gpus" in untold["fix"]
