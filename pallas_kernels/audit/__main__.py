"""`python -m pallas_kernels.audit probe FUNCTION SPEC...`; see --help.

The audit of all kernels is `lowbit-jax audit`: the ground floor has no table printer.
"""

from __future__ import annotations

import argparse
import sys

from pallas_kernels.audit.quiet import prepare


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    prepare()  # before anything imports jax
    from pallas_kernels.audit import probe, workers

    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.audit", description=__doc__)
    commands = parser.add_subparsers(required=True)
    probing = commands.add_parser("probe", help="one function, one target, one line")
    probe.add_arguments(probing)
    probing.set_defaults(run=probe.main)
    worker = commands.add_parser("worker", help="examines the jobs on its input; see workers")
    worker.set_defaults(run=lambda _: workers.serve(sys.stdin, sys.stdout))
    arguments = parser.parse_args(argv)
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
