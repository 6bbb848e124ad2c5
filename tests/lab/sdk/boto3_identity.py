"""Prints, as JSON, who boto3's default chain makes its caller. Usage: boto3_identity.py STS_ENDPOINT_URL"""

import json
import sys

import boto3

session = boto3.Session()
credentials = session.get_credentials()
if credentials is None:
    sys.exit("boto3 found no credentials")
identity = session.client("sts", endpoint_url=sys.argv[1]).get_caller_identity()
print(json.dumps({
    "arn": identity["Arn"],
    "account": identity["Account"],
    "access_key_id": credentials.access_key,
    # "iam-role" means the metadata service.
    "method": credentials.method,
}))
