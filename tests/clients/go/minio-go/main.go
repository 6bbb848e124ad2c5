// minio-go, and with it restic and many more.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"time"

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
	call(client)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		// As if they had come to their end.
		keys.Expire()
		call(client)
	}
}

func call(client *minio.Client) {
	start := time.Now()
	_, err := client.StatObject(context.Background(), os.Getenv("BUCKET"), os.Getenv("KEY"), minio.StatObjectOptions{})
	said := map[string]any{"seconds": time.Since(start).Seconds()}
	if err != nil {
		said["error"] = err.Error()
	}
	line, _ := json.Marshal(said)
	fmt.Println(string(line))
}
