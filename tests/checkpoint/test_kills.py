"""A save that is killed: the folder is the old checkpoint or the new one, wherever the kill falls, and the next save
removes what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Net
from kills import Killed, Watch, after_kills, leftovers, raising, state, switched_once, watched
from safetensors import safe_open
from torch import nn

from fp8gemm import CheckpointError, FP8GemmOptions, ScaledTensor, enable_fp8_gemm
from fp8gemm.checkpoint import convert_checkpoint, open_checkpoint, save_checkpoint


def facts(folder: Path) -> dict[str, Any]:
    """Everything that a reader gets from a folder."""
    checkpoint = open_checkpoint(folder)
    found: dict[str, Any] = {"format": checkpoint.format.name}
    for name in checkpoint:
        value = checkpoint[name]
        if isinstance(value, ScaledTensor):
            found[name] = value.data.view(torch.uint8).tolist(), value.scale.tolist(), checkpoint.layers[name].scheme
        else:
            found[name] = value.dtype, value.tolist()
    return found


def by_the_index(folder: Path) -> dict[str, Any]:
    """The tensors that a serving engine takes: those of all files, or of those that the index names if there is one."""
    files = {path.name for path in folder.glob("[!.]*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        assert named <= files
        files = named
    found: dict[str, Any] = {}
    for file in files:
        with safe_open(folder / file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                assert key not in found, f"{key} is in two files"
                found[key] = handle.get_tensor(key).to(torch.float32).tolist()
    return found


@cache
def net(seed: int, scheme: str = "row") -> nn.Module:
    torch.manual_seed(seed)
    model = Net()
    return model if scheme == "none" else enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))


def saved(
    seed: int, scheme: str = "row", size: int | str = "5GB", format: str = "compressed-tensors"
) -> Callable[[Path], Any]:
    return lambda folder: save_checkpoint(net(seed, scheme), folder, max_shard_size=size, format=format)


def nothing(folder: Path) -> None:
    folder.mkdir()


FEW, MANY = 18_000, 8_000  # bytes in a shard: two or three shards, and five
# name -> what is in the folder, and what is saved over it
SAVES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "other weights, one file": (saved(1), saved(2)),
    "other weights, shards": (saved(1, size=MANY), saved(2, size=MANY)),
    "another scheme, one file": (saved(1), saved(2, "tensor")),
    "another scheme, shards": (saved(1, size=MANY), saved(2, "block", MANY, "fine-grained")),
    "more shards": (saved(1, size=FEW), saved(2, size=MANY)),
    "fewer shards": (saved(1, size=MANY), saved(2, size=FEW)),
    "one file becomes shards": (saved(1), saved(2, size=MANY)),
    "one file becomes shards of another scheme": (saved(1), saved(2, "tensor", MANY)),
    "shards become one file": (saved(1, size=MANY), saved(2)),
    "shards become one file of another scheme": (saved(1, size=MANY), saved(2, "tensor")),
    "FP8 becomes dense": (saved(1, size=MANY), saved(2, "none")),
    "dense becomes FP8": (saved(1, "none"), saved(2, size=MANY)),
    "a first save, one file": (nothing, saved(2)),
    "a first save, shards": (nothing, saved(2, size=MANY)),
}


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes most of the time, and shows only when the power fails."""
    if "disk" not in request.node.name:
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("name", SAVES)
def test_the_old_or_the_new_checkpoint(name: str, tmp_path: Path) -> None:
    states, calls = after_kills(tmp_path, *SAVES[name], facts)
    assert len(calls) > 5
    assert switched_once(states), list(zip(calls, states, strict=False))


@pytest.mark.parametrize("name", SAVES)
def test_readers_that_know_no_switch_find_whole_weights(name: str, tmp_path: Path) -> None:
    """By the standard names alone, as vLLM reads: never a mixture of tensors, whatever the config says meanwhile."""
    if name.startswith("a first save"):
        pytest.skip("there is nothing to find before")
    states, calls = after_kills(tmp_path, *SAVES[name], by_the_index)
    assert switched_once(states), list(zip(calls, states, strict=False))


def test_a_single_file_that_describes_itself(tmp_path: Path) -> None:
    def saving(seed: int, scheme: str) -> Callable[[Path], Any]:
        return lambda folder: save_checkpoint(net(seed, scheme), folder / "net.safetensors", format="comfy")

    states, _ = after_kills(tmp_path, saving(1, "row"), saving(2, "tensor"), lambda f: facts(f / "net.safetensors"))
    assert switched_once(states)


def test_a_reader_by_path_is_never_given_the_other_config(tmp_path: Path) -> None:
    """model.safetensors alone, with the config beside it: old, new, or refused while the config is of another file."""
    before, save = SAVES["another scheme, one file"]

    def by_path(folder: Path) -> Any:
        try:
            return facts(folder / "model.safetensors")
        except CheckpointError as error:
            return "refused" if "open the folder" in str(error) else str(error)

    states, _ = after_kills(tmp_path, before, save, by_path)
    assert [state for state, _ in groupby(states)] == ["old", "refused", "new"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_and_fail(save: Callable[[Path], Any], place: Path, interrupted: bool) -> None:
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            save(place)
    else:
        with pytest.raises(CheckpointError, match=r"No space left on device; (nothing incomplete|it holds the new)"):
            save(place)


@pytest.mark.parametrize("name", ["another scheme, shards", "one file becomes shards", "shards become one file"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_save_that_fails_or_is_interrupted(name: str, error: BaseException, tmp_path: Path) -> None:
    """Before the switch nothing has changed, to the byte; after it the new checkpoint is there."""
    before, save = SAVES[name]
    before(tmp_path / "old")
    old, unchanged = facts(tmp_path / "old"), content(tmp_path / "old")
    before(tmp_path / "new")
    with watched(tmp_path / "new", None):
        save(tmp_path / "new")
    calls, new = Watch.calls, facts(tmp_path / "new")
    states = []
    for last, call in enumerate(calls):
        if call.startswith(("os.mkdir", "os.link")):
            continue  # the folder is there; and without links, files are copied
        place = tmp_path / str(last)
        before(place)
        with watched(place, last, raising(error)):
            save_and_fail(save, place, isinstance(error, KeyboardInterrupt))
        states.append(state(place, facts, old, new))
        assert states[-1] == "new" or content(place) == unchanged
    assert switched_once([*states, "new"]), states


@pytest.mark.parametrize("call", range(5))
def test_an_interrupt_just_after_a_rename(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename has happened, and nothing has noted it yet."""
    before, save = SAVES["another scheme, shards"]
    before(tmp_path / "old")
    save(tmp_path / "new")
    before(tmp_path / "it")
    replace, calls = os.replace, []

    def interrupted(source: Any, target: Any) -> None:
        replace(source, target)
        calls.append(target)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "it")
    switched = any(target.name == "config.json" for target in calls)
    assert state(tmp_path / "it", facts, facts(tmp_path / "old"), facts(tmp_path / "new")) == (
        "new" if switched else "old"
    )


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have none: the weights are copied then."""

    def refused(source: Any, target: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    states, calls = after_kills(tmp_path, *SAVES["another scheme, one file"], facts)
    assert not any(call.startswith("os.link") for call in calls)
    assert switched_once(states)


def test_renames_reach_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is flushed before each config that names other files, and before anything is removed."""
    saved(1, size=MANY)(tmp_path)
    events: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink
    folder = tmp_path.stat().st_ino

    def flushed(handle: int) -> None:
        events.append("folder" if os.fstat(handle).st_ino == folder else "file")
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        events.append(f"rename {Path(target).name}")
        replace(source, target)

    def removed(path: Any, **options: Any) -> None:
        events.append("remove")
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    saved(2, size=MANY)(tmp_path)
    configs = [index for index, event in enumerate(events) if event == "rename config.json"]
    assert len(configs) == 2
    for index in configs:
        names = [event for event in events[:index] if event == "folder" or event.startswith("rename")]
        assert names[-1] == "folder", "names that the config relies on are on the disk before it"
    for index, event in enumerate(events):
        if event == "remove":
            config = max(before for before in configs if before < index)
            assert "folder" in events[config:index]


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    saved(1, size=MANY)(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    (tmp_path / "model-00009-of-00009.safetensors").mkdir()
    saved(2)(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "pytorch_model.bin",
        "model-00009-of-00009.safetensors",
    }


def test_a_dense_save_keeps_the_config_of_the_model_alone(tmp_path: Path) -> None:
    saved(1)(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "net"}))
    saved(2, "none")(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "net"}


def test_a_config_that_is_a_folder_is_refused_before_anything_changes(tmp_path: Path) -> None:
    saved(1)(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"config\.json is a folder, not a file"):
        saved(2, size=MANY)(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_config_that_is_broken_is_replaced(tmp_path: Path) -> None:
    saved(1)(tmp_path)
    (tmp_path / "config.json").write_text("{")
    saved(2)(tmp_path)
    saved(2)(tmp_path / "fresh")
    assert facts(tmp_path) == facts(tmp_path / "fresh")


def test_converting_over_a_checkpoint(tmp_path: Path) -> None:
    """The other files are whole at every moment too."""
    saved(2, "block")(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text('{"new": 1}')

    def before(folder: Path) -> None:
        saved(1, size=MANY)(folder)
        (folder / "tokenizer.json").write_text('{"old": 1}')

    def read(folder: Path) -> Any:
        json.loads((folder / "tokenizer.json").read_text())
        return facts(folder)

    def convert(folder: Path) -> Any:
        return convert_checkpoint(tmp_path / "in", folder, format="fine-grained")

    before(tmp_path / "whole")
    old = read(tmp_path / "whole")
    with watched(tmp_path / "whole", None):
        convert(tmp_path / "whole")
    count, new, states = len(Watch.calls), read(tmp_path / "whole"), []
    for last in range(count):
        place = tmp_path / str(last)
        before(place)
        with watched(place, last), pytest.raises(Killed):
            convert(place)
        states.append(state(place, read, old, new))
    assert switched_once([*states, "new"]), states
    assert (tmp_path / "whole" / "tokenizer.json").read_text() == '{"new": 1}'


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_reader_beside_a_writer(name: str, tmp_path: Path) -> None:
    """Opening a folder while a save goes on gives one of the two checkpoints, whole."""
    size = "5GB" if name else MANY
    saved(0)(tmp_path / "row")
    saved(1, "tensor", size)(tmp_path / "tensor")
    both = [facts(tmp_path / "row"), facts(tmp_path / "tensor")]
    saved(0)(tmp_path / "it")
    failures: list[object] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                found = facts(tmp_path / "it" / name)
            except CheckpointError as error:
                if not (name and "open the folder" in str(error)):
                    failures.append(error)
            else:
                if found not in both:
                    failures.append("a mixture")

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        saved(1, "tensor", size)(tmp_path / "it")
        saved(0)(tmp_path / "it")
    done.set()
    reader.join()
    assert failures == []


def test_several_writers(tmp_path: Path) -> None:
    """Every rank of a job may save: one after the other."""
    saved(1)(tmp_path / "one")
    failures: list[BaseException] = []

    def save() -> None:
        try:
            saved(1, size=MANY)(tmp_path / "all")
        except BaseException as error:
            failures.append(error)

    ranks = [threading.Thread(target=save) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert failures == []
    assert facts(tmp_path / "all") == facts(tmp_path / "one")
    assert leftovers(tmp_path / "all") == set()


def llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(("old", "new"), [("5GB", 3000), (3000, "5GB"), (3000, 3000), ("5GB", "5GB")])
def test_what_transformers_finds(old: int | str, new: int | str, tmp_path: Path) -> None:
    """transformers' own from_pretrained switches at the same rename."""

    def read(folder: Path) -> Any:
        model, told = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        return model.config.rms_norm_eps, {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    models = llama(1), llama(2)
    models[1].config.rms_norm_eps = 1e-3
    before, save = (
        lambda folder, model=model, size=size: save_checkpoint(model, folder, max_shard_size=size)
        for model, size in zip(models, (old, new), strict=True)
    )
    states, calls = after_kills(tmp_path, before, save, read)
    assert switched_once(states), list(zip(calls, states, strict=False))


REAL = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:]
import test_kills as t

before, save = t.SAVES["one file becomes shards of another scheme"]
root = Path(sys.argv[1])
before(root / "old"), save(root / "new")
old, new = t.facts(root / "old"), t.facts(root / "new")
states = []
for last in range(100):
    before(root / str(last))
    child = os.fork()
    if not child:
        with t.watched(root / str(last), last, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            save(root / str(last))
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    states.append(t.state(root / str(last), t.facts, old, new))
    if not killed:
        break
print(len(states), t.switched_once(states))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_that_are_really_killed(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", REAL, str(tmp_path), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    count, once = done.stdout.split()
    assert int(count) > 10
    assert once == "True"
