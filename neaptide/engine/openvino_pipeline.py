"""The OpenVINO GenAI pipeline as our engine uses it: planned, loaded, calibrated, warmed up.

Apart from the engine so that the raw benchmark drives the very same pipeline.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from neaptide.clock import mono_s
from neaptide.engine import calibrate
from neaptide.engine.memory import available_bytes
from neaptide.engine.options import PLACEMENT, parse
from neaptide.engine.protocol import Sampling
from neaptide.errors import ConfigError, ModelError
from neaptide.models import directory
from neaptide.models.directory import ModelDir
from neaptide.specs import ReplicaSpec

# `import openvino` reports itself over the network unless this package is absent. Its converter, which we never call,
# is the part that reports; leaving it out also saves 45 ms of import.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402

UNDERSTOOD = (
    "threads", "kv_mib", "max_running", "chunk_tokens", "precision", "context_tokens", *PLACEMENT,
)  # fmt: skip
BLOCK_TOKENS = 32  # of the CPU plugin's paged attention; block_bytes was checked against its report
MAX_RUNNING = 64
KV_SHARE = 4  # at most 1/4 of free memory for KV, unless kv_mib says otherwise
WORKING_BYTES = 24 << 20  # graph and activations of a model; 18 MiB measured with the built-in one, 256-token chunks
GREEDY_BELOW = 1e-5  # colder, the softmax overflows and the answer is noise
RUNNING = genai.GenerationStatus.RUNNING
PRECISIONS = (None, "f32", "bf16", "f16")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the pipeline is built with; the raw benchmark builds the very same one."""

    files: ModelDir
    threads: int
    precision: str  # of the arithmetic; weights keep their own
    max_running: int
    kv_blocks: int
    prefix_cache: bool
    chunk_tokens: int
    pinned: bool

    @property
    def batched_tokens(self) -> int:
        """Decoding goes first, a token a request; what is left of a step is prefill, and must not be nothing."""
        return max(self.chunk_tokens, self.max_running + BLOCK_TOKENS)


def plan(spec: ReplicaSpec) -> Plan:
    """Read spec and model directory; chunk_tokens is 0 where it must still be measured. ModelError, ConfigError."""
    options = parse(spec, UNDERSTOOD)
    if options.precision not in PRECISIONS:
        raise ConfigError(
            f"precision {options.precision!r} is unknown",
            why="the openvino engine computes in f32, bf16 or f16",
            fix=f"correct models.{spec.model}.options.precision, or remove it",
        )
    files = directory.read(Path(spec.source))
    if options.context_tokens is not None:
        files = msgspec.structs.replace(files, context_tokens=min(options.context_tokens, files.context_tokens))
    max_running = options.max_running or MAX_RUNNING
    return Plan(
        files=files,
        threads=options.threads or len(os.sched_getaffinity(0)),
        # The library's own choice is asked for, so that it is told, and is part of a calibration's key: bf16 with AMX.
        precision=options.precision or ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name(),
        max_running=max_running,
        kv_blocks=_kv_blocks(files, max_running, options.kv_mib, max(1, len(spec.members))),
        # The library has one cache for all and no salt to divide it by tenant: `tenant` is served without a cache.
        prefix_cache=spec.prefix_cache == "shared",
        chunk_tokens=options.chunk_tokens or 0,
        pinned=bool(spec.engine_cpus),
    )


def build(plan: Plan) -> Any:
    """A loaded ContinuousBatchingPipeline. ModelError where the library cannot read the model."""
    scheduler = genai.SchedulerConfig()
    scheduler.dynamic_split_fuse = True
    scheduler.num_kv_blocks = plan.kv_blocks
    scheduler.max_num_batched_tokens = plan.batched_tokens
    scheduler.max_num_seqs = plan.max_running
    scheduler.enable_prefix_caching = plan.prefix_cache
    properties: dict[str, object] = {
        "INFERENCE_NUM_THREADS": plan.threads,
        "INFERENCE_PRECISION_HINT": plan.precision,
        "KV_CACHE_PRECISION": "u8",
        # Pinned by the library, two replicas would share the first cores while others idle; pin by engine_cpus.
        "ENABLE_CPU_PINNING": plan.pinned,
    }
    try:
        return genai.ContinuousBatchingPipeline(str(plan.files.path), scheduler, "CPU", properties)
    except RuntimeError as error:
        raise ModelError(
            f"{plan.files.path / directory.MODEL_XML} cannot be loaded: {last_line(error)}",
            why="it or its weights are damaged, or made by an OpenVINO that this one does not understand",
            fix="convert the model again: neaptide models convert DIR --to int8",
            code="E202",
        ) from error


def generation_config(sampling: Sampling, max_new_tokens: int, begun: int, eos_ids: frozenset[int]) -> Any:
    """The library's form of `sampling`. End-of-sequence and stop ids are one set there, and its ignore_eos ignores
    both: so the set is made here."""
    config = genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    config.min_new_tokens = min(max(0, sampling.min_tokens - begun), max_new_tokens)
    stops = stop_ids(sampling, eos_ids)
    if stops:
        config.stop_token_ids = set(stops)
        config.eos_token_id = next(iter(stops))  # unset, the library would add the model's own
    else:
        config.ignore_eos = True
    config.do_sample = sampling.temperature > GREEDY_BELOW
    if config.do_sample:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        if sampling.top_k > 0:
            config.top_k = sampling.top_k
        config.rng_seed = random.getrandbits(32) if sampling.seed is None else sampling.seed % (1 << 32)
    config.presence_penalty = sampling.presence_penalty
    config.frequency_penalty = sampling.frequency_penalty
    config.repetition_penalty = sampling.repetition_penalty
    config.logprobs = 0 if sampling.logprobs is None else 1
    return config


def stop_ids(sampling: Sampling, eos_ids: frozenset[int]) -> frozenset[int]:
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)


def load(planned: Plan, spec: ReplicaSpec, stages: dict[str, float]) -> tuple[Plan, Any]:
    """Load, measure prefill where no measurement is kept, load again where the guess was far off, warm up."""
    library, files, started_s = ov.get_version(), planned.files, mono_s()
    key = calibrate.key(
        model=files.digest,
        threads=planned.threads,
        precision=planned.precision,
        library=library,
    )
    known = calibrate.recall(spec.cache_dir, key)
    measure = known is None and not planned.chunk_tokens
    if not planned.chunk_tokens:
        rate = known.prefill_tokens_per_s if known else calibrate.guessed_rate(files.weight_bytes, planned.threads)
        planned = msgspec.structs.replace(planned, chunk_tokens=calibrate.chunk_tokens(rate, spec.slo_tpot_s))
    built = build(planned)
    stages["load_s"], started_s = mono_s() - started_s, mono_s()
    if measure:
        rate = prefill_rate(built, planned)
        calibrate.keep(spec.cache_dir, key, calibrate.Calibration(rate))
        chunk = calibrate.chunk_tokens(rate, spec.slo_tpot_s)
        if not calibrate.is_close(chunk, planned.chunk_tokens):
            planned = msgspec.structs.replace(planned, chunk_tokens=chunk)
            del built  # frees the weights before they are loaded again
            built = build(planned)
        stages["calibrate_s"], started_s = mono_s() - started_s, mono_s()
    _run(built, _filler(planned, BLOCK_TOKENS, 1), 4)
    stages["warmup_s"] = mono_s() - started_s
    return planned, built


def prefill_rate(built: Any, planned: Plan) -> float:
    """Tokens a second of one full chunk, the better of two after a short one that creates the kernels."""
    room = min(planned.files.context_tokens, planned.kv_blocks * BLOCK_TOKENS // 4) - 2
    tokens = max(1, min(planned.batched_tokens, room))
    _run(built, _filler(planned, min(tokens, BLOCK_TOKENS), 2), 1)
    times = []
    for salt in (3, 4):
        started_s = mono_s()
        _run(built, _filler(planned, tokens, salt), 1)
        times.append(mono_s() - started_s)
    return tokens / min(times)


def _filler(planned: Plan, tokens: int, salt: int) -> list[int]:
    """Distinct prompts, so that the prefix cache does not answer for the model."""
    vocabulary = planned.files.vocab_size
    return [(salt * 7919 + i * 104729) % vocabulary for i in range(tokens)]


def token_tensor(ids: list[int]) -> Any:
    return ov.Tensor(np.array([ids], dtype=np.int64))  # (1, tokens)


def _run(built: Any, prompt: list[int], max_new_tokens: int) -> None:
    config = generation_config(
        Sampling(max_tokens=max_new_tokens, temperature=0.0, ignore_eos=True), max_new_tokens, 0, frozenset()
    )
    handle = built.add_request(0, token_tensor(prompt), config)
    while handle.get_status() == RUNNING:
        built.step()


def block_bytes(files: ModelDir) -> int:
    """KV memory of a block in all layers, 8-bit: keys scaled by channel (one f32 scale and zero point a channel and
    block), values by token."""
    keys = BLOCK_TOKENS * files.head_dim + 8 * files.head_dim
    values = BLOCK_TOKENS * (files.head_dim + 8)
    return files.layers * files.kv_heads * (keys + values)


def memory_bytes(planned: Plan) -> int:
    """What the model takes beside others once all of its KV memory has been used."""
    return planned.files.weight_bytes + planned.kv_blocks * block_bytes(planned.files) + WORKING_BYTES


def _kv_blocks(files: ModelDir, max_running: int, kv_mib: int | None, sharers: int) -> int:
    """The given MiB, or enough for `max_running` full contexts within a share of free memory, which `sharers` models
    divide. The library touches pages as it uses them, and keeps them."""
    block = block_bytes(files)
    if kv_mib is not None:
        return max(2, (kv_mib << 20) // block)
    wanted = max_running * -(-files.context_tokens // BLOCK_TOKENS)
    return max(2, min(wanted, available_bytes() // (KV_SHARE * sharers) // block))


def last_line(error: Exception) -> str:
    """The library's messages begin with a check's source and a build path; the sense is at the end."""
    return str(error).strip().splitlines()[-1][-300:]
