"""A worker's environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RuntimeFault


@dataclass(frozen=True)
class Settings:
    """A worker's environment."""

    rank: int
    local_rank: int
    world: int
    control: str
    token: str
    artifact: Path
    weights: Path
    threads: int

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        try:
            return cls(
                int(env["RANK"]),
                int(env.get("LOCAL_RANK", env["RANK"])),
                int(env["WORLD_SIZE"]),
                env["MNEMOC_CONTROL"],
                env["MNEMOC_TOKEN"],
                Path(env["MNEMOC_ARTIFACT"]),
                Path(env["MNEMOC_WEIGHTS"]),
                int(env.get("MNEMOC_THREADS", "1")),
            )
        except KeyError as error:
            raise RuntimeFault(
                f"the environment variable {error.args[0]} is not set",
                do="start workers through `mnemoc run`, `mnemoc serve` or the plan's launch files",
            ) from error
