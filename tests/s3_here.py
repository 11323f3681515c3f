"""moto's S3 server on the loopback interface, and the environment by which clients find it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "rows"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """The server, with a bucket; its URL. Servers of one process have the same objects."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, f"http://{host}:{port}")
            boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def set_environment(patch: pytest.MonkeyPatch, url: str) -> None:
    """What a user sets to reach a server that is not Amazon's."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
        patch.setenv(name, value)


def objects() -> Any:
    """boto3's client, the independent one."""
    import boto3

    return boto3.client("s3")
