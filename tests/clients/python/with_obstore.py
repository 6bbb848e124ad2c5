"""Rust's object_store, as delta-rs, DataFusion and many more use it; here in its binding for Python."""

import os

from obstore.store import S3Store

import protocol


def call():
    store = S3Store(
        os.environ["BUCKET"],
        endpoint=os.environ["S3_URL"],
        region=os.environ["AWS_REGION"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 3},
    )
    store.head(os.environ["KEY"])


protocol.run(call)
