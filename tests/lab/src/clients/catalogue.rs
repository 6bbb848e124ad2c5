//! The clients, one a line. At least one of each language, and of the SDK in C++ and of GDAL, is quick. Where there are
//! several of a kind the others are in the matrix only, and so is what takes another release of Debian or compiles for
//! minutes.

use super::client::{Client, Start};

/// Every client that the installation knows, oldest SDKs first within a language.
pub const CLIENTS: &[Client] = &[
    quick("boto-2.49", Start::Python("with_boto2.py")).without_imdsv2(),
    heavy("boto-2.49-py27", Start::Built).without_imdsv2(),
    quick("botocore-1.5", Start::Python("with_botocore.py")).without_imdsv2(),
    heavy("botocore-1.13", Start::Python("with_botocore.py")).without_imdsv2(),
    quick("boto3", Start::Python("with_botocore.py")),
    quick("awscli-1", Start::Python("with_awscli.py")),
    quick("s3fs-py", Start::Python("with_s3fs.py")),
    quick("awscrt", Start::Python("with_awscrt.py")),
    quick("js-2.100", Start::Node("with_js2.js")).without_imdsv2(),
    quick("js-2.1693", Start::Node("with_js2.js")),
    quick("js-3", Start::Node("with_js3.js")),
    quick("go1-1.23", Start::Built).without_imdsv2(),
    quick("go1-1.25", Start::Built),
    quick("go1-1.55", Start::Built),
    heavy("go2-1.17", Start::Built),
    quick("go2", Start::Built),
    heavy("rusoto", Start::Built).without_imdsv2(),
    quick("rust", Start::Lab(&["calls"])),
    heavy("rust-imds", Start::Lab(&["calls", "--imds"])),
    quick("minio-py", Start::Python("with_minio.py")),
    quick("minio-go", Start::Built),
    heavy("minio-js", Start::Node("with_minio.js")),
    heavy("restic", Start::Shell(RESTIC)),
    quick("obstore", Start::Python("with_obstore.py")),
    quick("opendal", Start::Python("with_opendal.py")),
    heavy("s3cmd-2.3", Start::Shell(S3CMD)),
    quick("s3cmd", Start::Shell(S3CMD)),
    quick("curl", Start::Shell("exec sh $PROGRAMS/curl.sh")),
    heavy("awscli-2", Start::Built),
    heavy("awscli-2-sid", Start::Built),
    quick("java-1", Start::Java),
    heavy("java-2.18", Start::Java),
    heavy("java-2", Start::Java),
    quick("ruby", Start::Built),
    heavy("ruby-sid", Start::Built),
    quick("php-async-aws", Start::Built).without_imdsv2(),
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
