"""A worker's environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import RuntimeFault


@dataclass(frozen=True)
class Settings:
    """A worker's environment.

    local_rank, local_world: its number on its host, and how many are there
    token: what its set is called; None: it was started from outside, and is to be told
    secret: what it proves to an engine on another host
    """

    rank: int
    local_rank: int
    world: int
    control: str
    token: str | None
    artifact: Path
    weights: Path
    threads: int
    local_world: int = 1
    secret: bytes | None = field(default=None, repr=False)

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        try:
            return cls(
                int(env["RANK"]),
                int(env.get("LOCAL_RANK", env["RANK"])),
                int(env["WORLD_SIZE"]),
                env["MNEMOC_CONTROL"],
                env.get("MNEMOC_TOKEN"),
                Path(env["MNEMOC_ARTIFACT"]),
                Path(env["MNEMOC_WEIGHTS"]),
                int(env.get("MNEMOC_THREADS", "1")),
                int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            )
        except KeyError as error:
            raise RuntimeFault(
                f"the environment variable {error.args[0]} is not set",
                do="start workers through `mnemoc run`, `mnemoc serve` or the plan's launch files",
            ) from error
