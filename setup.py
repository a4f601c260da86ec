"""Packaging of moesys: parallel, kernels, launchers, configs and docs are inside the package through links.

So are benchmarks, comparisons with other systems; but of a checkout alone, not of a wheel.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="moesys",
    version=runpy.run_path(str(ROOT / "moesys" / "version.py"))["__version__"],
    description="Train Mixture-of-Experts language models on many machines: launch, choose, measure",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The moesys maintainers",
    keywords="mixture-of-experts moe expert-parallelism all-to-all distributed-training pytorch ray",
    python_requires=">=3.11",
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["moesys", "moesys.*"], exclude=["moesys.benchmarks", "moesys.benchmarks.*"]),
    package_data={
        "": ["*.json"],  # beside any module
        "moesys": ["py.typed", "configs/**/*.yaml", "configs/*.json", "docs/*.md", "docs/*.svg", "docs/*.png"],
    },
    install_requires=[
        "torch>=2.11,<2.15",
        "pydantic>=2.9",
        "pyyaml>=6",
        "rich>=13",
        "numpy>=1.26",
        "tensorboard>=2.16",
        "matplotlib>=3.9",
        "prometheus-client>=0.20",
        "safetensors>=0.5",
    ],
    extras_require={
        "ray": ["ray[train]>=2.60,<2.61"],
        "hf": ["datasets>=3", "tokenizers>=0.20"],
        "megatron": ["megatron-core==0.16.1"],
        "eval": ["lm_eval>=0.4.9,<0.5", "transformers>=5", "accelerate>=1"],
    },
    entry_points={"console_scripts": ["moesys = moesys.__main__:main"]},
)
