"""MinIO's client for Python."""

import os
import urllib.parse

from minio import Minio
from minio.credentials import IamAwsProvider

import protocol

address = urllib.parse.urlparse(os.environ["S3_URL"]).netloc
provider = IamAwsProvider()
client = Minio(address, credentials=provider, secure=False, region=os.environ["AWS_REGION"])


def call():
    client.stat_object(os.environ["BUCKET"], os.environ["KEY"])


def again():
    # As if they had come to their end.
    provider._credentials = None
    call()


protocol.run(call, again)
