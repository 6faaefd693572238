"""Greedy continuations by real vLLM, in a process of its own. Run as a program by the tests:

    python vllm_texts.py ASKED ANSWERED

ASKED: JSON, the folders of models and the token ids of prompts; ANSWERED: a file for the JSON of what each folder's model says.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

SPARING = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def main(asked: Path, answered: Path) -> None:
    os.environ.update(SPARING)
    from vllm import LLM, SamplingParams

    from unisd_megatron.weights import internlm3

    internlm3.register()
    question = json.loads(asked.read_text())
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    greedy = SamplingParams(temperature=0.0, max_tokens=question["length"], ignore_eos=True, detokenize=False)
    said = {}
    for folder in question["folders"]:
        engine = LLM(
            folder,
            dtype="float32",
            max_model_len=256,
            skip_tokenizer_init=True,
            generation_config="vllm",
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            block_size=32,
            enable_chunked_prefill=False,
            disable_log_stats=True,
        )
        said[folder] = [list(one.outputs[0].token_ids) for one in engine.generate(prompts, greedy, use_tqdm=False)]
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
    answered.write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
