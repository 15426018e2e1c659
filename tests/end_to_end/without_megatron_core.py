"""Run examples in a process that cannot import megatron-core, and write down what they did.

python without_megatron_core.py RESULT.json '{"fsdp2": [argument, ...], ...}' '{"fsdp2": port, ...}'

RANK and WORLD_SIZE are those of the job; an example without a port runs on rank 0 alone.
"""

import json
import os
import sys

sys.modules["megatron"] = None  # an import of it fails, by the language reference

from tests.end_to_end.examples_here import example, note_choices  # noqa: E402

OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(result: str, arguments: str, ports: str) -> None:
    job = {name: os.environ.pop(name) for name in OF_A_JOB if name in os.environ}
    port_of = json.loads(ports)
    results = {}
    for name, words in json.loads(arguments).items():
        if name in port_of:
            os.environ.update(job, MASTER_PORT=str(port_of[name]))
        elif job["RANK"] != "0":
            continue
        module = example(name)
        choices = note_choices(module)
        results[name] = {"records": module.main(words), "choices": choices}
        for variable in OF_A_JOB:
            os.environ.pop(variable, None)
    with open(result, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
