"""accelerate: offloading, dispatch, and loading into models that are patched, or not, on meta."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import accelerate
import torch
from compatibility import Trial
from tiny import IDS, error, is_fp8, llama, patched

from fp8gemm import FP8Weight, enable_fp8_gemm, load_checkpoint, report, save_checkpoint

CPU = torch.device("cpu")


@contextmanager
def saved() -> Iterator[tuple[str, torch.Tensor]]:
    """A folder of FP8 weights, and the logits of the model that was saved."""
    model = patched(llama())
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        yield folder, model(IDS).logits.detach()


@torch.no_grad()
def offloaded() -> None:
    model = patched(llama())
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(IDS).logits.equal(expected)
    assert all(row.dequantizations == 0 for row in report(model).converted)


def offloaded_to_disk() -> None:
    with tempfile.TemporaryDirectory() as folder:
        accelerate.disk_offload(patched(llama()), folder, execution_device=CPU)


@torch.no_grad()
def dispatched_from_meta() -> None:
    for patch_first in (True, False):
        with saved() as (folder, expected):
            with accelerate.init_empty_weights():
                model = llama()
            if patch_first:
                enable_fp8_gemm(model)
            load_checkpoint(model, folder)
            accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
            assert model(IDS).logits.equal(expected)
            assert is_fp8(model, 15)


@torch.no_grad()
def dense_into_patched_on_meta() -> None:
    """accelerate puts a parameter of its own in the place of each: the layers run dense, and the report says so."""
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        for load, fp8 in ((accelerate.load_checkpoint_and_dispatch, 0), (load_checkpoint, 15)):
            with accelerate.init_empty_weights():
                model = llama()
            enable_fp8_gemm(model)
            load(model, folder, **({} if fp8 else {"device_map": {"": "cpu"}}))
            assert is_fp8(model, fp8)
            assert model(IDS).logits.equal((patched(llama()) if fp8 else llama())(IDS).logits)
            reasons = {row.reason for row in report(model).kept}
            assert reasons == (set() if fp8 else {"its weight was replaced by a dense one after patching"})


def ours_into_patched_on_meta() -> None:
    with saved() as (folder, _):
        with accelerate.init_empty_weights():
            model = llama()
        accelerate.load_checkpoint_and_dispatch(enable_fp8_gemm(model), folder, device_map={"": "cpu"})


def ours_into_dense_strictly() -> None:
    with saved() as (folder, _), accelerate.init_empty_weights():
        accelerate.load_checkpoint_and_dispatch(llama(), folder, device_map={"": "cpu"}, strict=True)


@torch.no_grad()
def ours_into_dense() -> None:
    """accelerate leaves out the scales, with a warning: nothing of ours runs, so that nothing of ours can refuse."""
    with saved() as (folder, expected):
        with accelerate.init_empty_weights():
            model = llama()
        accelerate.load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})
        assert error(model(IDS).logits, expected) > 0.5


def prepared() -> None:
    model, accelerator = patched(llama()), accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if not isinstance(p, FP8Weight)], 1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(4):
        loss = prepared(input_ids=IDS, labels=IDS).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        accelerator.save_state(folder)
        expected = prepared(IDS).logits
        for parameter in prepared.parameters():
            parameter.zero_()
        accelerator.load_state(folder)
        assert prepared(IDS).logits.equal(expected)
        assert is_fp8(model, 15)


def device_map() -> None:
    """It multiplies counts by the size of the dtype that the weight appears to have, unless told otherwise."""
    model = patched(llama())
    names = {name: torch.float8_e4m3fn for name, p in model.named_parameters() if isinstance(p, FP8Weight)}
    sizes = accelerate.utils.compute_module_sizes(model, special_dtypes=names)
    assert abs(sizes[""] - model.get_memory_footprint()) < 0.1 * sizes[""]


def _trial(what: str, run: Callable[[], object], refused: str = "", note: str = "") -> Trial:
    return Trial(library="accelerate", what=what, run=run, refused=refused, note=note)


TRIALS = [
    _trial("`cpu_offload` of a patched model", offloaded, note="bytes move, nothing is dequantized"),
    _trial(
        "`disk_offload` of a patched model",
        offloaded_to_disk,
        refused="a file of FP8 bytes alone, as accelerate.disk_offload writes, is read back without their scales",
    ),
    _trial(
        "`init_empty_weights`, `load_checkpoint` of fp8gemm, `dispatch_model`, patched or not", dispatched_from_meta
    ),
    _trial(
        "`load_checkpoint_and_dispatch` of a dense folder into a model patched on meta",
        dense_into_patched_on_meta,
        note="its layers run dense then, as the report says; `fp8gemm.load_checkpoint` quantizes",
    ),
    _trial(
        "`load_checkpoint_and_dispatch` of an FP8 folder into a model patched on meta",
        ours_into_patched_on_meta,
        refused="on meta until fp8gemm.load_checkpoint(model, folder) fills it",
    ),
    _trial(
        "`load_checkpoint_and_dispatch(strict=True)` of an FP8 folder into a dense model",
        ours_into_dense_strictly,
        refused="does not have a parameter or a buffer named weight_scale",
    ),
    Trial(
        library="accelerate",
        what="`load_checkpoint_and_dispatch` of an FP8 folder into a dense model",
        run=ours_into_dense,
        wrong="accelerate drops the scales and only warns; use `fp8gemm.load_checkpoint`, then `dispatch_model`",
    ),
    _trial("`Accelerator.prepare`, `backward`, `save_state`, `load_state`", prepared),
    _trial(
        "`infer_auto_device_map`, `compute_module_sizes`", device_map, note="with `special_dtypes`; dense sizes else"
    ),
]
