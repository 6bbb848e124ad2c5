"""The package ec2-metadata: each of its properties, as JSON; what it raises, as text."""

import inspect
import json
from collections.abc import Mapping

from ec2_metadata import EC2Metadata, NetworkInterface, ec2_metadata


def read(owner, name):
    try:
        return getattr(owner, name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def is_property(member):
    return isinstance(member, property) or type(member).__name__ == "cached_property"


def properties(owner):
    return {name: read(owner, name) for name, _ in inspect.getmembers(type(owner), is_property)}


def plain(value):
    if isinstance(value, NetworkInterface):
        return properties(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


print(json.dumps(properties(ec2_metadata), default=plain))
