"""Log-probabilities of prompts as vLLM computes them from checkpoints: ``python serving.py PROMPTS.json FOLDER ...``.

Prints one line of JSON for each folder: the log-probabilities of each prompt's tokens but the first, or an error. Runs
in an environment of vLLM's own, which need not have fp8gemm.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def run_blocks_without_amx() -> None:
    """vLLM asks for AMX before it runs blocks on a CPU, but its operators for them also run with AVX512-BF16."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, compute_capability=None: (True, None))
    CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)


def answers(folder: str, prompts: list[list[int]]) -> list[list[float]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    model = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    wanted = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    given = model.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], wanted, use_tqdm=False)
    return [
        [one.prompt_logprobs[index][prompt[index]].logprob for index in range(1, len(prompt))]
        for one, prompt in zip(given, prompts, strict=True)
    ]


def main(file: str, *folders: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    run_blocks_without_amx()
    prompts = json.loads(Path(file).read_text())
    for folder in folders:
        found: dict[str, Any] = {"folder": Path(folder).name}
        try:
            found["answers"] = answers(folder, prompts)
        except Exception as error:  # whatever vLLM raises is what it says of this checkpoint
            found["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(found), flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
