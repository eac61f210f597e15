"""What the benchmarks share: the C programs, CPU clocks, `neaptide up` as a context, medians and the result file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
PROGRAMS = HERE / "gateway"
RESULTS = HERE / "results"
NEAPTIDE = str(Path(sys.executable).parent / "neaptide")
LOAD_CORE, SERVE_CORE = 0, 1


class BenchError(Exception):
    """The measurement could not be made; says what to do."""


# ------------------------------------------------------------------------------------------------ C programs


def build(*names: str, into: Path = PROGRAMS) -> dict[str, str]:
    """Compile bench/gateway/NAME.c where the source is newer; {name: path of the program}."""
    made = {}
    for name in names:
        source, program = PROGRAMS / f"{name}.c", into / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            command = ["gcc", "-O2", "-Wall", "-Wno-unused-result", "-o", str(program), str(source)]
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                raise BenchError("gcc is needed to build the load generator: apt-get install gcc libc6-dev") from None
        made[name] = str(program)
    return made


@dataclass(frozen=True, kw_only=True)
class Load:
    """One run of loadgen.c (its head explains the modes)."""

    body: Mapping[str, Any]
    mode: str = "closed"
    conns: int = 64
    duration_s: float = 8.0
    warmup_s: float = 1.0
    options: Mapping[str, object] = field(default_factory=dict)  # {"rate": 300} -> --rate 300
    path: str = "/v1/chat/completions"


def drive(
    load: Load,
    port: int,
    *,
    key: str = "",
    watch: Mapping[str, Sequence[int]] | None = None,
    core: int | None = LOAD_CORE,
    realtime: Sequence[int] = (),
    program: str = "",
) -> dict[str, Any]:
    """loadgen's result, with cpu_s {group: CPU seconds of those processes while it measured} and others_cpu_s, what
    everybody else on the machine took meanwhile. `realtime`: processes put under SCHED_RR for the run (as root), so
    that other work on the machine does not show up as tail latency."""
    program = program or build("loadgen")["loadgen"]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        body, headers = Path(scratch, "body.json"), Path(scratch, "headers")
        body.write_text(json.dumps(load.body))
        headers.touch(mode=0o600)
        headers.write_text(f"Authorization: Bearer {key}\n" if key else "")
        command = [program, "--port", port, "--path", load.path, "--mode", load.mode, "--conns", load.conns]
        command += ["--duration", load.duration_s, "--warmup", load.warmup_s, "--body", body, "--headers", headers]
        command += [part for name, value in load.options.items() for part in (f"--{name}", value)]
        with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
            pin([process.pid], core)
            groups = {**(watch or {}), "loadgen": [process.pid]}
            with _realtime([*realtime, process.pid] if realtime else []):
                result = _follow(process, groups)
    if not result:
        raise BenchError(f"loadgen said nothing (exit {process.returncode}): {command}")
    return result


def _follow(process: subprocess.Popen[str], groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    busy = 0.0
    result: dict[str, Any] = {}
    assert process.stdout is not None
    for line in process.stdout:
        told = json.loads(line)
        if told.get("marker") == "measure_start":
            before = {name: cpu_s(pids) for name, pids in groups.items()}
            busy = _machine_busy_s()
        elif told.get("marker") == "measure_end":
            after = {name: cpu_s(pids) for name, pids in groups.items()}
            busy = _machine_busy_s() - busy
        else:
            result = told
    if result:
        result["cpu_s"] = {name: round(after[name] - before[name], 4) for name in groups if name in before}
        result["others_cpu_s"] = round(max(0.0, busy - sum(result["cpu_s"].values())), 2)
    return result


# ------------------------------------------------------------------------------------------------ processes


def tree(pids: Sequence[int]) -> list[int]:
    """The processes and their descendants."""
    found = list(pids)
    for pid in pids:
        try:
            found += [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return list(dict.fromkeys(found))


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds so far; exact to the nanosecond from schedstat where the kernel keeps it, else to the tick."""
    total = 0.0
    for pid in pids:
        try:
            tasks = [Path(f"/proc/{pid}/task/{t}/schedstat").read_text() for t in os.listdir(f"/proc/{pid}/task")]
            exact = sum(int(text.split()[0]) for text in tasks) / 1e9
            total += exact or sum(psutil.Process(pid).cpu_times()[:2])
        except (OSError, IndexError, psutil.NoSuchProcess):
            continue
    return total


def _machine_busy_s() -> float:
    times = psutil.cpu_times()
    not_busy = ("idle", "iowait", "guest", "guest_nice")  # guest time is counted in user already
    return float(sum(times) - sum(getattr(times, name, 0.0) for name in not_busy))


def rss_mib(pids: Sequence[int]) -> float:
    """Resident memory in MiB, shared pages counted once for each process."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def pin(pids: Sequence[int], core: int | None) -> None:
    """All threads of the processes to one core; nothing on a machine that has no such core."""
    if core is None or core not in os.sched_getaffinity(0):
        return
    for pid in pids:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), {core})
        except (FileNotFoundError, ProcessLookupError):
            continue


@contextmanager
def _realtime(pids: Sequence[int]) -> Iterator[None]:
    _schedule(pids, os.SCHED_RR, 1)
    try:
        yield
    finally:
        _schedule(pids, os.SCHED_OTHER, 0)


def _schedule(pids: Sequence[int], policy: int, priority: int) -> None:
    for pid in pids:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setscheduler(int(task), policy, os.sched_param(priority))
        except PermissionError:
            return  # not root: the run is noisier, and others_cpu_s says by how much
        except (FileNotFoundError, ProcessLookupError):
            continue


@contextmanager
def running(command: Sequence[object], *, core: int | None, ready: Callable[[], bool], what: str) -> Iterator[int]:
    """A process while the block runs; its pid. BenchError when it is not ready within 10 s."""
    process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL)
    pin([process.pid], core)
    try:
        wait_for(lambda: process.poll() is not None or ready(), 10.0, what)
        if process.poll() is not None:
            raise BenchError(f"{what} ended at once with exit code {process.returncode}")
        yield process.pid
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.02)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------ neaptide up


@dataclass(frozen=True)
class Up:
    api: str  # http://127.0.0.1:PORT/v1
    admin: str
    key: str
    pids: dict[str, list[int]]  # supervisor, control, gateway, replica
    ready_s: float
    state: Path

    @property
    def port(self) -> int:
        return int(self.api.split(":")[2].split("/")[0])

    def group(self, *roles: str) -> list[int]:
        """Their processes. A replica's are its I/O process alone; `engine` is what those started."""
        found: list[int] = []
        for role in roles:
            mine = self.pids.get("replica" if role == "engine" else role, [])
            found += [p for p in tree(mine) if p not in mine] if role == "engine" else mine
        return found


@contextmanager
def up(config: str, *, port: int = 0) -> Iterator[Up]:
    """`neaptide up -d` with this neaptide.yaml, on a free port and in a state directory of its own; down at the end,
    also when we are told to end."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="neaptide-bench-") as scratch:
        file, state = Path(scratch, "neaptide.yaml"), Path(scratch, "state")
        file.write_text(config)
        command = [NEAPTIDE, "up", "-d", "-f", str(file), "--state", str(state), "--port", str(port)]
        started = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300, check=False)
        if started.returncode:
            raise BenchError(f"{' '.join(command)} failed ({started.returncode}):\n{started.stderr}{started.stdout}")
        told = json.loads(started.stdout)
        try:
            yield Up(told["api"], told["admin"], told["key"], told["pids"], told["ready_s"], state)
        finally:
            subprocess.run([NEAPTIDE, "down", "--state", str(state)], check=True, timeout=60, stdout=subprocess.DEVNULL)
            signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------ results


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def save(name: str, result: Mapping[str, Any]) -> Path:
    """bench/results/NAME.json: the result, the machine, the time and the command that repeats it."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    record = {"command": again(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine()}
    file.write_text(json.dumps({**record, **result}, indent=1) + "\n")
    print(f"written to {file.relative_to(ROOT)}; repeat with: {again()}")
    return file


def again() -> str:
    main = sys.modules["__main__"]
    module = main.__spec__.name if getattr(main, "__spec__", None) else Path(sys.argv[0]).stem
    return shlex.join([".venv/bin/python", "-m", module, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Enough to judge a number by: processor, cores, memory, kernel, Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table on stdout, ready for docs/results.md."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in (head, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def chat(model: str, text: str, **fields: Any) -> dict[str, Any]:
    """A chat completion's body; streaming bodies ask for usage, so that tokens can be counted."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body
