"""The command line interface, version 1: its own `main`, so that the start of the interpreter does not count."""

import os

from awscli.clidriver import create_clidriver

import protocol


def call():
    # An object for each call: as for each command, nothing is kept.
    arguments = ["sts", "get-caller-identity", "--output", "text", "--endpoint-url", os.environ["STS_URL"]]
    code = create_clidriver().main(arguments)
    if code:
        raise RuntimeError(f"exit code {code}")


protocol.run(call)
