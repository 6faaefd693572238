"""What torch sees of this machine, as one line of JSON: a program, so that a broken installation costs a line and no more."""

from __future__ import annotations

import json
from typing import Any


def look() -> dict[str, Any]:
    """GPUs that torch can compute on, the libraries torch was built with, and the platform that a run would choose."""
    import torch

    from unisd_megatron.errors import MissingDependency
    from unisd_megatron.mcore import platform as platforms

    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(number)
        torch.ones(8, device=f"cuda:{number}").sum().item()  # listed is not yet usable
        gpus.append(
            {"name": found.name, "gib": found.total_memory / 2**30, "capability": [found.major, found.minor]},
        )
    try:
        runs_on = platforms.choose().reason
    except MissingDependency as error:
        runs_on = f"NOT usable: {error}"
    return {
        "gpus": gpus,
        "platform": runs_on,
        "CUDA": torch.version.cuda or "none",
        "cuDNN": torch.backends.cudnn.version() or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if gpus else "none",
    }


if __name__ == "__main__":
    print(json.dumps(look()))
