"""Gives back to old libraries what Python has dropped since: import this before them. It changes no library's file."""

import collections
import collections.abc
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types

for name in ("Callable", "Iterable", "Iterator", "Mapping", "MutableMapping", "MutableSet", "Sequence"):
    if not hasattr(collections, name):
        setattr(collections, name, getattr(collections.abc, name))

if not hasattr(inspect, "getargspec"):
    inspect.getargspec = lambda function: inspect.getfullargspec(function)[:4]


def module(name, **members):
    if importlib.util.find_spec(name) is None:
        made = types.ModuleType(name)
        vars(made).update(members)
        sys.modules[name] = made


def parse_header(line):
    value, *parameters = line.split(";")
    pairs = (parameter.strip().partition("=") for parameter in parameters)
    return value.strip(), {key.lower(): text.strip('"') for key, _, text in pairs}


module("cgi", parse_header=parse_header)
module("imp")


class VendoredSix(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Copies of six from before Python 3.12 have an importer that Python no longer calls: the installed one stands in."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.endswith((".six", ".six.moves")) or ".six.moves." in fullname:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return importlib.import_module("six" + spec.name.rpartition(".six")[2])

    def exec_module(self, module):
        pass


if sys.version_info >= (3, 12):
    sys.meta_path.insert(0, VendoredSix())
