// Command soulbox-agent is the first process of every sandbox. The runtime starts it, never a person.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"soulbox.dev/soulbox/agent/guest"
)

// version is set by the linker.
var version = "dev"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "soulbox-agent:", err)
		os.Exit(1)
	}
}

// maxProcs is the largest number of processors that the agent uses, see agent/guest/processors.go.
const maxProcs = 2

func run(args []string) error {
	debug.SetMemoryLimit(40 << 20)
	runtime.GOMAXPROCS(min(runtime.GOMAXPROCS(0), maxProcs))
	if len(args) == 1 && args[0] == "attach" {
		return guest.Attach(os.Stdin, os.Stdout)
	}
	image := len(args) == 2 && args[1] == "image" // the root is an image, in which files have the right owners
	if len(args) == 0 || args[0] != "init" || len(args) > 1 && !image || os.Getpid() != 1 {
		return errors.New("this is the first process of a SoulBox sandbox; it is of no use elsewhere")
	}
	server, err := guest.NewServer(guest.Options{
		Version: version, SpoolDir: "/var/lib/soulbox/output", ShellDir: "/run/soulbox", Init: true, Image: image,
		Log: func(format string, a ...any) { fmt.Fprintf(os.Stderr, format+"\n", a...) },
	})
	if err != nil {
		return err
	}
	// Catch these signals, so that the sandbox survives a host that closes the pipe, and signals that Linux would not let end an init.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
		syscall.SIGABRT, syscall.SIGUSR1, syscall.SIGALRM,
		syscall.SIGVTALRM, syscall.SIGPROF, syscall.SIGIO, syscall.SIGPWR, syscall.SIGXCPU, syscall.SIGXFSZ, syscall.SIGSTKFLT,
		syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU)
	go func() { _ = server.ListenAttach() }()
	// Then the Go runtime waits for stdin and stdout by epoll: a thread that blocks in a read would hold back a processor.
	for _, fd := range []int{0, 1} {
		if err := syscall.SetNonblock(fd, true); err != nil {
			return err
		}
	}
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGUSR2)
	server.ServeStdio(os.NewFile(0, "stdin"), os.NewFile(1, "stdout"), again)
	return nil
}
