"""Which folders a wheel holds; all else about the package is in pyproject.toml.

The library keeps its name. tokenizer/, data_tools/ and launch/ would be top-level packages of names
that other projects use as well, so a wheel carries them inside the library, in
megatron_slm/_checkout/, where megatron_slm/installation.py finds them.
"""

from setuptools import find_packages, setup

CARRIED = "megatron_slm._checkout"
BESIDE_THE_LIBRARY = ("tokenizer", "data_tools", "launch")

library = [*find_packages(include=["megatron_slm*"]), "megatron_slm.evaluation.tasks"]  # data
beside = find_packages(include=["tokenizer*", "data_tools*"])
beside += ["launch", "launch.recipes", "launch.pipelines"]  # data, and scripts that are no modules
carried = [f"{CARRIED}.{name}" for name in beside]
places = {f"{CARRIED}.{name}": name for name in BESIDE_THE_LIBRARY}
setup(packages=library + carried, package_dir=places)
