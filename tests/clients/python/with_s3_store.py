"""Writes an object and reads it back, at an S3-compatible store: its text, or the code of the store's refusal."""

import os

import boto3
from botocore.exceptions import ClientError

name = {"Bucket": os.environ["BUCKET"], "Key": os.environ["KEY"]}
store = boto3.client("s3", endpoint_url=os.environ["S3_URL"])
try:
    store.put_object(**name, Body=b"a reading")
    print(store.get_object(**name)["Body"].read().decode())
except ClientError as error:
    print(error.response["Error"]["Code"])
