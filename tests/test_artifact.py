"""The artifact folder: written whole or not at all, verified to the last byte."""

import dataclasses
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.alternatives import Alternative
from mnemoc.artifact import (
    ChunkRule,
    Manifest,
    Memory,
    Optimality,
    Plan,
    Prediction,
    Stage,
    Workload,
)
from mnemoc.codec import from_json
from mnemoc.errors import BadInput
from mnemoc.folder import load_artifact, write_artifact
from mnemoc.layout import Layout

PLAN = Plan(
    target="cpu",
    dtype="float32",
    layout=Layout(2, 2, 1),
    stages=(Stage("stage_0", 0, 3), Stage("stage_1", 3, 1)),
    chunks=(ChunkRule(0, 512, 256, 1, 0.5), ChunkRule(512, 4096, 64, 2, 0.25)),
    page_size=16,
    num_pages=64,
    stripe_tokens=1024,
    max_batch=4,
    max_rows=1024,
    predicted=Prediction(1.5, 0.1, 20.0, {"linear": 1.0, "attention": 0.5}, {"linear": 0.1}),
    memory=Memory(1, 2, 3, 4, 5, 6, 7, "a step"),
    optimality=Optimality("gpus", 4.0, 4.0, 0.0),
    binding="ttft",
    alternatives=(Alternative(Layout(1, 4, 1), 4, 2.0, 0.2, "slower"),),
    notes=("a note",),
)
MANIFEST = Manifest({"name": "m"}, {"name": "c"}, Workload(4096, 1.0, 0.1), PLAN)
FILES = {"cost.py": b"x = 1\n", "kernels/a.py": b"y = 2\n", "ir/model.mir": b"module\n"}


@pytest.fixture
def folder(tmp_path):
    write_artifact(tmp_path / "plan", MANIFEST, FILES)
    return tmp_path / "plan"


def test_what_was_written_is_read_back(folder):
    manifest, contents = load_artifact(folder)
    assert contents == FILES
    assert dataclasses.replace(manifest, files={}) == MANIFEST


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    write_artifact(tmp_path / "again", MANIFEST, dict(reversed(FILES.items())))
    for path in (*FILES, "manifest.json"):
        assert (folder / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


@given(st.data())
def test_any_changed_byte_of_any_file_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tamper") / "plan"
    write_artifact(folder, MANIFEST, FILES)
    path = folder / data.draw(st.sampled_from([*FILES, "manifest.json"]))
    original = path.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    changed = data.draw(st.integers(0, 255).filter(lambda byte: byte != original[at]))
    path.write_bytes(original[:at] + bytes([changed]) + original[at + 1 :])
    with pytest.raises(BadInput):
        load_artifact(folder)


def test_missing_and_added_files_are_refused(folder):
    (folder / "kernels" / "b.py").write_text("z = 3\n")
    with pytest.raises(BadInput, match="does not list"):
        load_artifact(folder)
    (folder / "kernels" / "b.py").unlink()
    (folder / "cost.py").unlink()
    with pytest.raises(BadInput, match="missing from the plan"):
        load_artifact(folder)


def test_another_format_is_refused_by_its_number(folder):
    path = folder / "manifest.json"
    body = json.loads(path.read_text()) | {"format": 7}
    path.write_text(json.dumps(body))
    with pytest.raises(BadInput, match="format 7"):
        load_artifact(folder)


def test_a_folder_that_is_not_a_plan_is_neither_read_nor_overwritten(tmp_path):
    with pytest.raises(BadInput, match="not a plan"):
        load_artifact(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="exists and is not a plan"):
        write_artifact(tmp_path, MANIFEST, FILES)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_plan_is_replaced_whole(folder):
    write_artifact(folder, MANIFEST, {"cost.py": b"x = 2\n"})
    assert load_artifact(folder)[1] == {"cost.py": b"x = 2\n"}


def test_nothing_is_left_behind_when_writing_fails(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        write_artifact(blocker / "plan", MANIFEST, FILES)
    with pytest.raises(TypeError):
        write_artifact(tmp_path / "plan", MANIFEST, {"cost.py": b"", "kernels/a.py": None})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"tp": "2"}, "expected int"),
        ({"tp": True}, "expected int"),
    ],
)
def test_json_of_the_wrong_shape_is_refused(change, message):
    with pytest.raises(BadInput, match=message):
        from_json(Layout, {"tp": 2, "spp": 1, "kvp": 1} | change, "layout")


def test_a_missing_key_is_named():
    with pytest.raises(BadInput, match="key 'kvp' is missing"):
        from_json(Layout, {"tp": 2, "spp": 1}, "layout")


def test_ranks_and_coordinates_are_inverse():
    layout = Layout(tp=2, spp=3, kvp=4)
    coordinates = [layout.coordinates(rank) for rank in range(layout.gpus)]
    assert [layout.rank(*c) for c in coordinates] == list(range(24))
    assert coordinates[:3] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]  # tp innermost, then kvp


def test_chunks_are_looked_up_by_what_is_cached():
    assert [PLAN.chunk_at(n) for n in (0, 511, 512, 9999)] == [256, 256, 64, 64]


def test_a_copy_elsewhere_is_still_valid(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert load_artifact(tmp_path / "moved")[1] == FILES
