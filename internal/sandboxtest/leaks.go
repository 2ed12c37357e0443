package sandboxtest

import (
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// NoLeaks runs a package's tests, which fail if a goroutine outlives them. Those that have one of the known functions on their stack may:
// what a library keeps for the life of the process. The wait is far beyond what it should take, as in Eventually.
func NoLeaks(m *testing.M, known ...string) {
	var ignore []goleak.Option
	for _, f := range known {
		ignore = append(ignore, goleak.IgnoreAnyFunction(f))
	}
	code := m.Run()
	for end := time.Now().Add(30 * time.Second); code == 0; {
		http.DefaultClient.CloseIdleConnections() // they are the tests' own
		err := goleak.Find(ignore...)             // asks for about a second
		if err == nil {
			break
		}
		if time.Now().After(end) {
			fmt.Fprintln(os.Stderr, "goroutines are left:", err)
			code = 1
		}
	}
	os.Exit(code)
}
