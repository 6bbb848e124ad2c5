// The SDK for Go, version 2.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

func main() {
	ctx := context.Background()
	start := time.Now()
	cfg, err := config.LoadDefaultConfig(ctx)
	client := sts.NewFromConfig(cfg, func(options *sts.Options) {
		options.BaseEndpoint = aws.String(os.Getenv("STS_URL"))
	})
	if err == nil {
		_, err = client.GetCallerIdentity(ctx, nil)
	}
	tell(start, err)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		start = time.Now()
		cfg.Credentials.(*aws.CredentialsCache).Invalidate()
		_, err = client.GetCallerIdentity(ctx, nil)
		tell(start, err)
	}
}

func tell(start time.Time, err error) {
	said := map[string]any{"seconds": time.Since(start).Seconds()}
	if err != nil {
		said["error"] = err.Error()
	}
	line, _ := json.Marshal(said)
	fmt.Println(string(line))
}
