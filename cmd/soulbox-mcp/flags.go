package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// usageError is the error of a wrong command line.
type usageError struct{ error }

// Unwrap lets errors.Is and errors.As look at what is wrong.
func (u usageError) Unwrap() error { return u.error }

// noCommand is the error of an unknown command; help is the command that lists the known ones.
func noCommand(name, help string) error {
	return usageError{fmt.Errorf("there is no command %q; '%s' lists the commands", name, help)}
}

// parseFlags parses flags, which no arguments may follow. Asked for help it shows the flags on stderr, and returns flag.ErrHelp.
func parseFlags(flags *flag.FlagSet, args []string, stderr io.Writer) error {
	flags.SetOutput(io.Discard) // package flag shows all flags for every error
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stderr)
		flags.Usage()
		return err
	case err == nil && flags.NArg() == 0:
		return nil
	case err == nil:
		err = fmt.Errorf("there is no argument %q", flags.Arg(0))
	default:
		err = explain(flags, err)
	}
	return usageError{fmt.Errorf("%w; '%s -h' lists the options", err, flags.Name())}
}

// explain rewords an error of package flag, and adds how a time is written.
func explain(flags *flag.FlagSet, err error) error {
	if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		return fmt.Errorf("there is no option --%s", strings.Trim(strconv.Quote(name), `"`))
	}
	_, name, _ := strings.Cut(err.Error(), "for flag -")
	name, _, _ = strings.Cut(name, ":")
	if f := flags.Lookup(name); f != nil {
		if v, ok := f.Value.(flag.Getter); ok {
			if _, ok := v.Get().(time.Duration); ok {
				return fmt.Errorf("%w; give a time such as 90s, 5m or 2h", err)
			}
		}
	}
	return err
}

// isGiven reports whether a flag was given, whatever its value.
func isGiven(f *flag.FlagSet, name string) (given bool) {
	f.Visit(func(one *flag.Flag) { given = given || one.Name == name })
	return given
}

// list is a flag that may be repeated, or have values separated by commas.
type list []string

// String implements flag.Value.
func (l *list) String() string { return strings.Join(*l, ",") }

// Set implements flag.Value.
func (l *list) Set(v string) error {
	*l = append(*l, strings.Split(v, ",")...)
	return nil
}
