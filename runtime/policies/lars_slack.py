"""LARS, and slack put to use: a long prompt ahead of its deadline leaves room beside it (the paper's rule and
ρ_max), and decodes ahead of their promise lend time to a prompt that would be late."""

from __future__ import annotations

from .lars import order
from .policy import Policy

POLICY = Policy("lars-slack", order, room=0.4, least_room=0.2, stretch=2.0, preempts=0.5)
