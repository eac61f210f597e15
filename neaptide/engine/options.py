"""An engine's settings out of its spec: strict, so that a misspelt or misplaced option is an error, not a surprise."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from neaptide.errors import ConfigError
from neaptide.specs import EngineOptions, ReplicaSpec

PLACEMENT = ("cpus", "io_cpus", "step_log")  # acted on outside of the engine; every engine accepts them
_DEFAULTS = EngineOptions()


def wants_step_log(spec: ReplicaSpec) -> bool:
    return parse(spec, EngineOptions.__struct_fields__).step_log


def parse(spec: ReplicaSpec, understood: Collection[str]) -> EngineOptions:
    """ConfigError for an unknown option, a wrong type, or an option set that this engine does not understand."""
    try:
        options = msgspec.json.decode(msgspec.json.encode(spec.options), type=EngineOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"options of {spec.model!r}: {error}",
            why=f"the {spec.engine} engine knows: {', '.join(sorted(understood))}",
            fix=f"correct models.{spec.model}.options in neaptide.yaml",
        ) from error
    for name in EngineOptions.__struct_fields__:
        if name not in understood and getattr(options, name) != getattr(_DEFAULTS, name):
            raise ConfigError(
                f"the {spec.engine} engine has no option {name!r}",
                why=f"it knows: {', '.join(sorted(understood))}",
                fix=f"remove models.{spec.model}.options.{name} from neaptide.yaml",
            )
    for name in ("threads", "kv_mib", "max_running", "chunk_tokens", "context_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"models.{spec.model}.options.{name} is {value}",
                why="it must be at least 1",
                fix=f"give a positive number, or remove models.{spec.model}.options.{name}",
            )
    return options
