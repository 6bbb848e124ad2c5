// The SDK for Go, version 1, of any age.
package main

import (
	"os"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"
)

func main() {
	client := sts.New(session.Must(session.NewSession()), &aws.Config{Endpoint: aws.String(os.Getenv("STS_URL"))})
	call := func() error {
		_, err := client.GetCallerIdentity(&sts.GetCallerIdentityInput{})
		return err
	}
	run(call, func() error {
		// As if they had come to their end.
		client.Config.Credentials.Expire()
		return call()
	})
}
