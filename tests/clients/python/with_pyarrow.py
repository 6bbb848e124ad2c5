"""The SDK for C++, which pyarrow reads S3 with."""

import os
import urllib.parse

from pyarrow import fs

import protocol

address = urllib.parse.urlparse(os.environ["S3_URL"]).netloc


def call():
    files = fs.S3FileSystem(endpoint_override=address, scheme="http", region=os.environ["AWS_REGION"])
    info = files.get_file_info(f"{os.environ['BUCKET']}/{os.environ['KEY']}")
    if info.type != fs.FileType.File:
        raise RuntimeError(f"{info}")


protocol.run(call)
