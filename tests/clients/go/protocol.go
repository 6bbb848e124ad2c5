// How a program of the matrix tells what came of its calls: one line of JSON each, the next call for each line that
// comes in.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// run makes the first call, and `again` for each line: the same call, once its credentials are gone; or with those that
// it has, if the line says so.
func run(call func() error, again func() error) {
	tell(call)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if lines.Text() == "go on" {
			tell(call)
		} else {
			tell(again)
		}
	}
}

func tell(call func() error) {
	start := time.Now()
	err := call()
	said := map[string]any{"seconds": time.Since(start).Seconds()}
	if err != nil {
		said["error"] = err.Error()
	}
	line, _ := json.Marshal(said)
	fmt.Println(string(line))
}
