"""LARS, and slack put to use: a long prompt leaves room for short ones beside it, and decodes ahead of their
promise lend time to a prompt that would be late.

The paper has a long prompt leave its relative slack, up to 0.4, whether others use it or not. Here it has
back what they leave, so room costs it only what they need: a quarter of the time is its own in any case.
"""

from __future__ import annotations

from .lars import order
from .policy import Policy

POLICY = Policy("lars-slack", order, room=0.9, least_room=0.75, stretch=2.0, preempts=0.5)
