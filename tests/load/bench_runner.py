"""The service with another number of document workers and another batch size, for the benchmark's grid.

Usage: ``python -m tests.load.bench_runner WORKERS SIZE [the service's flags]``
"""

import sys

import micro_svc_demo

if __name__ == "__main__":
    for name, value in zip(("threads", "batch_size"), sys.argv[1:3], strict=True):
        if not hasattr(micro_svc_demo.Loader, name):
            sys.exit(f"Loader has no {name} to be set")
        setattr(micro_svc_demo.Loader, name, int(value))
    sys.exit(micro_svc_demo.main(sys.argv[3:]))
