"""torchrun that passes on its workers' exit code.

`torchrun` itself ends with 1 whatever its workers ended with, and prints a traceback even when they stopped on request. Batch
scripts must tell "stopped on request, run me again" (85) from a failure, so they start processes through this:

    python launch/processes.py TORCHRUN_OPTIONS -m megatron_slm.train --config RECIPE.yaml

It takes torchrun's own options. Exit code: the first failing worker's (128 + n when it was killed by signal n), 0 when none failed.
"""

import sys

STOPPED_ON_REQUEST = 85


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if code == STOPPED_ON_REQUEST:
            print(
                "stopped on request; start the same command again to continue",
                file=sys.stderr,
            )
        else:
            print(
                f"process {rank} failed first, with exit code {code}; its message is above",
                file=sys.stderr,
            )
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
