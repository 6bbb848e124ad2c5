"""GDAL's /vsis3/, in rasterio's build of it, without the credentials that rasterio would fetch by boto3."""

import os
import urllib.parse

import rasterio
from rasterio.session import DummySession

import protocol

address = urllib.parse.urlparse(os.environ["S3_URL"]).netloc
OPTIONS = {
    "AWS_S3_ENDPOINT": address,
    "AWS_HTTPS": "NO",
    "AWS_VIRTUAL_HOSTING": "FALSE",
    "AWS_REGION": os.environ["AWS_REGION"],
    # Not only if a file of the system says that this is EC2.
    "CPL_AWS_AUTODETECT_EC2": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # Or the second call would be answered from memory.
    "CPL_VSIL_CURL_NON_CACHED": f"/vsis3/{os.environ['BUCKET']}",
}


def call():
    with rasterio.Env(session=DummySession(), **OPTIONS):
        with rasterio.open(f"/vsis3/{os.environ['BUCKET']}/{os.environ['KEY']}") as grid:
            grid.read(1)


protocol.run(call)
