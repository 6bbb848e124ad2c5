"""How a program of the matrix tells what came of its calls: one line of JSON each, the next call for each line that
comes in."""

import json
import sys
import time


def tell(call):
    start = time.monotonic()
    error = None
    try:
        call()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    print(json.dumps({"seconds": time.monotonic() - start, "error": error}), flush=True)


def run(call, again=None):
    """The first call, then one call more for each line. `again` is given where a client object goes on."""
    tell(call)
    for _ in sys.stdin:
        tell(again or call)
