"""How a program of the matrix tells what came of its calls: one line of JSON each, the next call for each line that
comes in. For Python 2 too."""

import json
import sys
import time

clock = getattr(time, "monotonic", time.time)


def tell(call):
    start = clock()
    error = None
    try:
        call()
    except Exception as raised:
        error = "{}: {}".format(type(raised).__name__, raised)
    sys.stdout.write(json.dumps({"seconds": clock() - start, "error": error}) + "\n")
    sys.stdout.flush()


def run(call, again=None):
    """The first call, then one call more for each line: `again` gets new credentials for it, where `call` goes on with
    those that it has."""
    tell(call)
    # Not the file's own iterator: that of Python 2 reads ahead.
    for line in iter(sys.stdin.readline, ""):
        tell(call if line.strip() == "go on" else again or call)
