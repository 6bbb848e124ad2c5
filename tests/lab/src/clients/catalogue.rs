//! The clients, one a line.

use super::client::{Client, Start};

/// Every client that the installation knows, oldest SDKs first within a language.
pub const CLIENTS: &[Client] = &[
    quick("boto-2.49", Start::Python("with_boto2.py")).without_imdsv2(),
    quick("botocore-1.5", Start::Python("with_botocore.py")).without_imdsv2(),
    quick("boto3", Start::Python("with_botocore.py")),
    quick("awscli-1", Start::Shell("exec $PYTHON -m awscli sts get-caller-identity --endpoint-url $STS_URL")),
    quick("js-2.100", Start::Node("with_js2.js")).without_imdsv2(),
    quick("go2", Start::Built),
    quick("rust", Start::Lab),
];

const fn quick(name: &'static str, start: Start) -> Client {
    Client { name, start, quick: true, knows_imdsv2: true }
}

const fn heavy(name: &'static str, start: Start) -> Client {
    Client { name, start, quick: false, knows_imdsv2: true }
}

impl Client {
    const fn without_imdsv2(self) -> Self {
        Self { knows_imdsv2: false, ..self }
    }
}
