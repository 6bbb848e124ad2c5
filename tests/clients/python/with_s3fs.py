"""s3fs, and under it aiobotocore: what pandas and Dask read S3 with."""

import os

import s3fs

import protocol


def call():
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(endpoint_url=os.environ["S3_URL"], skip_instance_cache=True, config_kwargs={"retries": {"total_max_attempts": 1}})
    files.info(f"{os.environ['BUCKET']}/{os.environ['KEY']}", refresh=True)


protocol.run(call)
