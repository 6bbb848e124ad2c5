"""boto 2, which knows IMDSv1 only; for the Python of its time too."""

import os
import sys

if sys.version_info >= (3,):
    import python_before_3_10  # noqa: F401

import boto.exception
from boto.compat import urlparse
from boto.regioninfo import RegionInfo
from boto.sts import STSConnection

import protocol

address = urlparse(os.environ["STS_URL"])
region = RegionInfo(name=os.environ["AWS_REGION"], endpoint=address.hostname)


connection = None


def fresh():
    global connection
    connection = STSConnection(region=region, port=address.port, is_secure=False)
    connection.num_retries = 0
    # It finds these in the name of the host, which the stand-in has none of.
    connection.auth_service_name, connection.auth_region_name = "sts", region.name
    identify()


def identify():
    # It is older than this action, and has a method for those that it has none for.
    answer = connection.make_request("GetCallerIdentity", {}, "/", "POST")
    if answer.status != 200:
        raise boto.exception.BotoServerError(answer.status, answer.reason, answer.read())


def call():
    identify() if connection else fresh()


protocol.run(call, fresh)
