"""The SDK alone in a loop, connected as the service connects: the ceiling of what a service can pass on.

Usage: ``python -m tests.load.bench_sdk THREADS BATCH SECONDS DOCUMENTS`` with the COUCHBASE_* settings in the
environment. It prints one line of JSON: operations a second, and the microseconds of processor time of each.
"""

import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import micro_svc_demo


def loop(collection: Any, batch: int, documents: int, seed: int, stop: threading.Event) -> int:
    """Get random documents until told to stop; return how many."""
    draw = random.Random(seed)
    count = 0
    if batch == 1:
        while not stop.is_set():
            collection.get(f"user_data:{draw.randint(1, documents)}")
            count += 1
    else:
        numbers = range(1, documents + 1)
        while not stop.is_set():
            collection.get_multi([f"user_data:{number}" for number in draw.sample(numbers, batch)])
            count += batch
    return count


def main() -> None:
    """Run the threads for the seconds asked for."""
    threads, batch, seconds, documents = map(int, sys.argv[1:5])
    settings = micro_svc_demo.read_settings([], os.environ)
    cluster = micro_svc_demo.open_cluster(settings)
    collection = cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope).collection("user_data")
    collection.get("user_data:1")
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        started, used = time.monotonic(), time.process_time()
        loops = [pool.submit(loop, collection, batch, documents, seed, stop) for seed in range(threads)]
        time.sleep(seconds)
        stop.set()
        total = max(1, sum(each.result() for each in loops))
        elapsed, used = time.monotonic() - started, time.process_time() - used
    print(json.dumps({"requests_per_second": total / elapsed, "cpu_us": used * 1e6 / total}))
    cluster.close()


if __name__ == "__main__":
    main()
