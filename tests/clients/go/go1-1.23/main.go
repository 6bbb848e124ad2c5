// The SDK for Go, version 1, of any age.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"
)

func main() {
	client := sts.New(session.Must(session.NewSession()), &aws.Config{Endpoint: aws.String(os.Getenv("STS_URL"))})
	start := time.Now()
	_, err := client.GetCallerIdentity(&sts.GetCallerIdentityInput{})
	tell(start, err)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		start = time.Now()
		// As if they had come to their end.
		client.Config.Credentials.Expire()
		_, err = client.GetCallerIdentity(&sts.GetCallerIdentityInput{})
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
