"""Small models and clusters: big enough to have choices, small enough to enumerate."""

import dataclasses
from collections.abc import Callable

import pytest
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.planner import Cluster
from mnemoc.planner.cluster import Quantity
from mnemoc.planner.curves import constant, through

NUMBERS = {
    "nodes": 2,
    "devices_per_node": 4,
    "peak.float32": 1e11,
    "memory.bandwidth": 1e10,
    "memory.capacity": 1e9,
    "memory.reserve": 1e8,
    "efficiency.link": 0.9,
    "overhead.launch": 1e-6,
    "overhead.iteration": 1e-4,
    "overhead.row": 2e-5,
    "links.intra.latency": 1e-5,
    "links.intra.bandwidth": 1e10,
    "links.inter.latency": 5e-5,
    "links.inter.bandwidth": 1e9,
}

CURVES = {
    "matmul": through([(1, 0.1), (16, 0.6), (256, 0.8)], "rows", "test"),
    "attention_prefill": through([(16, 0.3), (512, 0.5)], "rows", "test"),
    "attention_decode": through([(1e5, 0.4), (1e7, 0.8)], "B", "test"),
    "memory": constant(0.7, "B", "test"),
}


def small_cluster(**changed: float) -> Cluster:
    """A CPU cluster; keys with "__" for the dots of the file's keys."""
    numbers = NUMBERS | {key.replace("__", "."): value for key, value in changed.items()}
    quantities = {key: Quantity(float(value), "", "test") for key, value in numbers.items()}
    return Cluster("small", "test core", "cpu", "small.toml", quantities, CURVES)


def small_model(**changed: int) -> ModelSpec:
    return dataclasses.replace(load_model("tiny-llama"), **changed)


@pytest.fixture
def cluster() -> Callable[..., Cluster]:
    return small_cluster


@pytest.fixture
def model() -> Callable[..., ModelSpec]:
    return small_model
