"""The Common Runtime, which the AWS CLI, S3 clients and several SDKs build on: its default chain and its signer."""

import http.client
import os
import urllib.parse

from awscrt.auth import AwsCredentialsProvider, AwsSigningConfig, aws_sign_request
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup, InputStream

import io
import protocol

BODY = b"Action=GetCallerIdentity&Version=2011-06-15"
address = urllib.parse.urlparse(os.environ["STS_URL"])
group = EventLoopGroup(1)
bootstrap = ClientBootstrap(group, DefaultHostResolver(group))


def call():
    provider = AwsCredentialsProvider.new_default_chain(bootstrap)
    credentials = provider.get_credentials().result(30)
    kind = "application/x-www-form-urlencoded"
    headers = HttpHeaders([("host", address.netloc), ("content-type", kind), ("content-length", str(len(BODY)))])
    request = HttpRequest("POST", "/", headers, InputStream(io.BytesIO(BODY)))
    provider = AwsCredentialsProvider.new_static(
        credentials.access_key_id, credentials.secret_access_key, credentials.session_token
    )
    config = AwsSigningConfig(credentials_provider=provider, region=os.environ["AWS_REGION"], service="sts")
    signed = aws_sign_request(request, config).result(30)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
    connection.request("POST", "/", BODY, dict(signed.headers))
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read()!r}")


protocol.run(call)
