"""botocore of any age: what boto3 is made of."""

import os

import python_before_3_10  # noqa: F401

import botocore.config
import botocore.session

import protocol


sts = None


def fresh():
    global sts
    session = botocore.session.get_session()
    # For nothing but STS itself: it is on this machine and has no reason to fail.
    config = botocore.config.Config(connect_timeout=5, read_timeout=5)
    sts = session.create_client("sts", endpoint_url=os.environ["STS_URL"], config=config)
    sts.get_caller_identity()


def call():
    sts.get_caller_identity() if sts else fresh()


protocol.run(call, fresh)
