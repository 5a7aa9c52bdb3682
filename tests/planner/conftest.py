"""Small models and clusters: big enough to have choices, small enough to enumerate."""

import dataclasses
from collections.abc import Callable

import pytest
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.planner import Cluster
from mnemoc.planner.cluster import Quantity

NUMBERS = {
    "nodes": 2,
    "devices_per_node": 4,
    "peak.float32": 1e11,
    "memory.bandwidth": 1e10,
    "memory.capacity": 1e9,
    "memory.reserve": 1e8,
    "efficiency.matmul": 0.8,
    "efficiency.attention_prefill": 0.5,
    "efficiency.attention_decode": 0.8,
    "efficiency.memory": 0.7,
    "efficiency.link": 0.9,
    "overhead.launch": 1e-6,
    "overhead.iteration": 1e-4,
    "links.intra.latency": 1e-5,
    "links.intra.bandwidth": 1e10,
    "links.inter.latency": 5e-5,
    "links.inter.bandwidth": 1e9,
}


def small_cluster(**changed: float) -> Cluster:
    """A CPU cluster; keys with "__" for the dots of the file's keys."""
    numbers = NUMBERS | {key.replace("__", "."): value for key, value in changed.items()}
    quantities = {key: Quantity(float(value), "", "test") for key, value in numbers.items()}
    return Cluster("small", "test core", "cpu", "small.toml", quantities)


def small_model(**changed: int) -> ModelSpec:
    return dataclasses.replace(load_model("tiny-llama"), **changed)


@pytest.fixture
def cluster() -> Callable[..., Cluster]:
    return small_cluster


@pytest.fixture
def model() -> Callable[..., ModelSpec]:
    return small_model
