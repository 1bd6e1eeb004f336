"""Splits the FP8 weights of a small Llama among processes: each loads its own part, straight from the files.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp8gemm import FP8Weight, enable_fp8_gemm, load_checkpoint, save_checkpoint

BY_COLUMNS, BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=1000, **sizes)).eval()


def split(model: transformers.PreTrainedModel, mesh: DeviceMesh) -> None:
    plan = {name: ColwiseParallel() for name in BY_COLUMNS} | {name: RowwiseParallel() for name in BY_ROWS}
    parallelize_module(model, mesh, {f"model.layers.*.*.{name}": style for name, style in plan.items()})


def main() -> None:
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    whole, folder = enable_fp8_gemm(llama()), [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)  # all use that of rank 0
    if mesh.get_rank() == 0:
        save_checkpoint(whole, folder[0])
    dist.barrier()
    with torch.device("meta"):
        model = llama()
    split(model, mesh)
    load_checkpoint(model, folder[0], device=device)

    tokens = torch.arange(12, device=device).view(2, 6)
    with torch.inference_mode():
        found, expected = model(tokens).logits, whole.to(device)(tokens).logits
    parts = [parameter.to_local() for parameter in model.parameters() if hasattr(parameter, "to_local")]
    here = sum(part.nbytes for part in parts if isinstance(part, FP8Weight))
    everywhere = sum(layer.weight.nbytes for layer in whole.model.layers.modules() if hasattr(layer, "in_features"))
    error = ((found - expected).norm() / expected.norm()).item()
    if mesh.get_rank() == 0:
        print(f"rank 0 of {mesh.size()}: {here} of {everywhere} bytes in FP8, relative error of the logits {error:.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
