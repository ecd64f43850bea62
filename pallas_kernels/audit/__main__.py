"""`python -m pallas_kernels.audit probe FUNCTION SPEC...`; see --help."""

from __future__ import annotations

import argparse
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    # before jax is imported: the plugin registers its compiler, and no device is looked for
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from pallas_kernels.audit import probe

    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.audit", description=__doc__)
    commands = parser.add_subparsers(required=True)
    probing = commands.add_parser("probe", help="one function, one target, one line")
    probe.add_arguments(probing)
    probing.set_defaults(run=probe.main)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
