"""Prints, as JSON, the access key id that boto 2 gets from the metadata service, which it asks without a session."""

import importlib.util
import json
import sys
import types

import six

# boto is older than Python 3.12: its own copy of six has no importer that this Python calls, and it imports a
# module that is gone, though only for plugins.
spec = importlib.util.spec_from_file_location("boto.vendored.six", six.__file__)
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
if importlib.util.find_spec("imp") is None:
    sys.modules["imp"] = types.ModuleType("imp")

import boto.provider  # noqa: E402

provider = boto.provider.Provider("aws")
if provider.access_key is None:
    sys.exit("boto found no credentials")
print(json.dumps({"access_key_id": provider.access_key}))
