<?php
// AsyncAws, which Symfony and Laravel applications use in the place of AWS's own SDK.

require 'AsyncAws/Core/autoload.php';

use AsyncAws\Core\Configuration;
use AsyncAws\Core\Sts\StsClient;

function tell(): void
{
    $start = hrtime(true);
    $error = null;
    try {
        $configuration = Configuration::create(['endpoint' => getenv('STS_URL'), 'region' => getenv('AWS_REGION')]);
        (new StsClient($configuration))->getCallerIdentity()->resolve();
    } catch (\Throwable $thrown) {
        $error = get_class($thrown).': '.$thrown->getMessage();
    }
    echo json_encode(['seconds' => (hrtime(true) - $start) / 1e9, 'error' => $error]), "\n";
}

tell();
while (false !== fgets(STDIN)) {
    tell();
}
