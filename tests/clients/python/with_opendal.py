"""OpenDAL, whose signer is reqsign; here in its binding for Python."""

import os

import opendal

import protocol


def call():
    operator = opendal.Operator(
        "s3", bucket=os.environ["BUCKET"], endpoint=os.environ["S3_URL"], region=os.environ["AWS_REGION"]
    )
    operator.stat(os.environ["KEY"])


protocol.run(call)
