import json
import logging
import threading
from pathlib import Path

import pytest
import torch

from harness.checkpoint import (
    CheckpointFolder,
    load,
    load_weights,
    remove_torn,
    save,
    save_weights,
    to_cpu,
    weights_digest,
)
from harness.errors import UserError


def state(value: float) -> dict[str, object]:
    return {"net": {"w": torch.full((3,), value)}, "step": int(value), "nested": [{"a": None, "b": (1, 2.5)}]}


def nothing() -> None:
    """What is done after a write where nobody waits for it."""


@pytest.fixture
def folder(tmp_path: Path):
    made = CheckpointFolder(tmp_path, keep=2)
    yield made
    made.close()


def test_a_state_comes_back_and_needs_no_pickle(tmp_path: Path):
    save(tmp_path / "a.pt", state(3), "key")
    found = load(tmp_path / "a.pt", "key")
    assert found is not None
    assert found["net"]["w"].tolist() == [3, 3, 3]
    assert found["step"] == 3
    torch.load(tmp_path / "a.pt", weights_only=True)


def test_the_last_k_are_kept_and_the_newest_is_found(folder: CheckpointFolder, tmp_path: Path):
    for step in [1, 2, 10]:
        folder.write("search", step, "key", state(step), nothing)
    folder.write("finetune", 11, "key", state(11), nothing)
    folder.flush()
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "finetune-00000011.pt",
        "search-00000002.pt",
        "search-00000010.pt",
    ]
    found = folder.newest("search", "key")
    assert found is not None
    assert found[0]["step"] == 10
    assert found[1].name == "search-00000010.pt"
    assert folder.newest("search", "another key") is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "digest gone", "digest torn", "file gone"])
def test_a_damaged_one_is_skipped_for_the_one_before(
    damage: str, folder: CheckpointFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for step in [1, 2]:
        folder.write("search", step, "key", state(step), nothing)
    folder.flush()
    newest = tmp_path / "search-00000002.pt"
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[:-100])
    elif damage == "flipped":
        newest.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "digest gone":
        newest.with_suffix(".json").unlink()
    elif damage == "digest torn":
        newest.with_suffix(".json").write_text('{"format"')
    else:
        newest.unlink()
    with caplog.at_level(logging.WARNING):
        found = folder.newest("search", "key")
    assert found is not None
    assert found[0]["step"] == 1
    if damage in {"truncated", "flipped", "digest torn"}:
        assert "search-00000002.pt" in caplog.text


def test_done_is_called_once_the_checkpoint_can_be_read(folder: CheckpointFolder, tmp_path: Path):
    seen = []
    folder.write("search", 1, "key", state(1), lambda: seen.append(load(tmp_path / "search-00000001.pt", "key")))
    folder.flush()
    assert seen[0]["step"] == 1


def test_writing_does_not_hold_up_the_caller(folder: CheckpointFolder):
    release = threading.Event()
    folder.write("search", 1, "key", state(1), lambda: release.wait(30))
    folder.write("search", 2, "key", state(2), nothing)
    release.set()
    folder.flush()
    assert folder.newest("search", "key")[0]["step"] == 2


def test_a_failed_write_is_raised_in_the_caller(folder: CheckpointFolder, tmp_path: Path):
    (tmp_path / "search-00000001.pt").mkdir()
    folder.write("search", 1, "key", state(1), nothing)
    with pytest.raises(RuntimeError, match="writing a checkpoint failed"):
        folder.flush()
    (tmp_path / "search-00000001.pt").rmdir()


def test_a_copy_is_not_touched_by_later_steps():
    weight = torch.ones(2, 3).contiguous()
    copied = to_cpu({"w": weight, "list": [weight]})
    weight.zero_()
    assert copied["w"].sum() == 6
    assert copied["list"][0].sum() == 6


def test_the_digest_of_weights_sees_bits_not_memory_layout():
    weight = torch.randn(2, 3, 4, 4)
    digest = weights_digest({"w": weight})
    assert weights_digest({"w": weight.contiguous(memory_format=torch.channels_last)}) == digest
    changed = weight.clone()
    changed[0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0], torch.tensor(9e9))
    assert weights_digest({"w": changed}) != digest
    assert weights_digest({"v": weight}) != digest


def test_weights_from_elsewhere_are_checked(tmp_path: Path):
    save_weights(tmp_path / "good.pt", {"w": torch.ones(1)})
    assert load_weights(tmp_path / "good.pt")["w"].item() == 1
    with pytest.raises(UserError, match="weights not found: .*absent.pt"):
        load_weights(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text.pt is not a readable state dict"):
        load_weights(tmp_path / "text.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt holds no state dict"):
        load_weights(tmp_path / "other.pt")


def test_digest_file_names_what_it_vouches_for(tmp_path: Path):
    save(tmp_path / "a.pt", state(1), "key")
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["key"] == "key"
    assert about["bytes"] == (tmp_path / "a.pt").stat().st_size


def test_what_killed_writers_left_is_taken_away(tmp_path: Path):
    save(tmp_path / "a.pt", state(1), "key")
    (tmp_path / ".a.pt.node-7.tmp").write_bytes(b"half")
    remove_torn(tmp_path, tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt"]


def test_what_a_checkpoint_covers_is_made_durable_before_it(folder: CheckpointFolder, tmp_path: Path):
    seen = []
    before = lambda: seen.append([path.name for path in tmp_path.glob("*.pt")])  # noqa: E731
    folder.write("search", 1, "key", state(1), nothing, before=before)
    folder.flush()
    assert seen == [[]]
