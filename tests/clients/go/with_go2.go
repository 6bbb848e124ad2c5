// The SDK for Go, version 2, of any age.
package main

import (
	"context"
	"os"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

func main() {
	ctx := context.Background()
	var cfg aws.Config
	var client *sts.Client
	call := func() error {
		_, err := client.GetCallerIdentity(ctx, nil)
		return err
	}
	run(func() (err error) {
		if client != nil {
			return call()
		}
		if cfg, err = config.LoadDefaultConfig(ctx); err != nil {
			return err
		}
		client = sts.NewFromConfig(cfg, func(options *sts.Options) {
			// The way that old versions have too.
			options.EndpointResolver = sts.EndpointResolverFromURL(os.Getenv("STS_URL"))
		})
		return call()
	}, func() error {
		// As if they had come to their end.
		cfg.Credentials.(*aws.CredentialsCache).Invalidate()
		return call()
	})
}
