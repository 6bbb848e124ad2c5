"""cloud-init's EC2 data source, which reads all that the listings name: what it finds, as JSON."""

import json

from cloudinit.helpers import Paths
from cloudinit.sources import DataSourceEc2 as ec2


class Source(ec2.DataSourceEc2):
    # It would decide by the hardware's names whether this is EC2, and by DNS which addresses to try.
    cloud_name = ec2.CloudNames.AWS

    def wait_for_metadata_service(self):
        self.metadata_address = self._maybe_fetch_api_token(["http://169.254.169.254"])
        return bool(self.metadata_address)


found = Source({}, None, Paths({})).crawl_metadata()
print(json.dumps(found, default=lambda value: value.decode()))
