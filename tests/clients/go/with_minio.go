// minio-go, and with it restic and many more.
package main

import (
	"context"
	"net/url"
	"os"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

func main() {
	store, _ := url.Parse(os.Getenv("S3_URL"))
	keys := credentials.NewIAM("")
	client, err := minio.New(store.Host, &minio.Options{Creds: keys, Region: os.Getenv("AWS_REGION"), MaxRetries: 1})
	if err != nil {
		panic(err)
	}
	call := func() error {
		_, err := client.StatObject(context.Background(), os.Getenv("BUCKET"), os.Getenv("KEY"), minio.StatObjectOptions{})
		return err
	}
	run(call, func() error {
		// As if they had come to their end.
		keys.Expire()
		return call()
	})
}
