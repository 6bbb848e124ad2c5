"""The package ec2-metadata: each of its properties, as JSON; what it raises, as text."""

import inspect
import json

from ec2_metadata import EC2Metadata, ec2_metadata


def read(name):
    try:
        return getattr(ec2_metadata, name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def is_property(member):
    return isinstance(member, property) or type(member).__name__ == "cached_property"


names = [name for name, _ in inspect.getmembers(EC2Metadata, is_property)]
print(json.dumps({name: read(name) for name in names}, default=str))
