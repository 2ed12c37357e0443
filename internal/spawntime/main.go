// Command spawntime prints the median time, in microseconds, of fork, exec and wait of /bin/true by the agent's own way of starting
// processes (rawsys.Spawn): the minimum for every exec. BenchmarkSoulBox runs it in a sandbox; it is not shipped, 'make bench' builds it.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent/guest/rawsys"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "spawntime:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("give a number")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil || n <= 0 {
		return errors.New("give a number")
	}
	runtime.GOMAXPROCS(min(runtime.GOMAXPROCS(0), 2)) // as the agent has
	times := make([]time.Duration, n)
	for i := range times {
		if times[i], err = spawn("/bin/true"); err != nil {
			return err
		}
	}
	slices.Sort(times)
	_, err = fmt.Println(times[n/2].Microseconds())
	return err
}

// spawn starts a program, waits for its end, and returns how long both took.
func spawn(name string) (time.Duration, error) {
	begin := time.Now()
	c, err := rawsys.Spawn(name, []string{name}, rawsys.Attr{Stdio: [3]int{0, 1, 2}})
	if err != nil {
		return 0, err
	}
	var status syscall.WaitStatus
	for err = syscall.EINTR; errors.Is(err, syscall.EINTR); {
		_, err = syscall.Wait4(c.PID, &status, unix.WALL, nil)
	}
	if err != nil || status != 0 {
		return 0, errors.Join(err, fmt.Errorf("%s ended with status %#x", name, status))
	}
	return time.Since(begin), nil
}
