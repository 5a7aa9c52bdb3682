"""What a plan can serve at all, whoever else is there: told at once, before a request waits for ever."""

from __future__ import annotations

from dataclasses import dataclass

from ...artifact import Manifest
from ...errors import BadInput
from ...units import format_count
from .growth import Growth


@dataclass(frozen=True)
class Limits:
    """context: tokens of a prompt; pages: of each KVP group."""

    context: int
    growth: Growth
    page_size: int
    pages: int

    @classmethod
    def of(cls, manifest: Manifest) -> Limits:
        plan = manifest.plan
        return cls(manifest.workload.context, Growth.of(plan), plan.page_size, plan.num_pages)

    def refusal(self, prompt: int, output: int) -> BadInput | None:
        """Why so many tokens of a prompt and of its answer can never be served, or None if they can."""
        if prompt > self.context:
            return BadInput(
                f"the prompt has {prompt:,} tokens, the plan is for {format_count(self.context)}",
                do=f"shorten it, or plan with --context {prompt}",
            )
        tokens = prompt + output - 1  # the last one generated is never cached
        needed = -(-self.growth.held(0, tokens) // self.page_size)  # the first shard is the fullest
        if needed > self.pages:
            return BadInput(
                f"{prompt:,} prompt tokens and {output:,} new ones need {needed:,} KV pages of a "
                f"group, the plan has {self.pages:,}",
                do="shorten the prompt, lower max_tokens, or plan with a larger --context",
            )
        return None
