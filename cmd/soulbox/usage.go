package main

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// group is a command that only has subcommands. It refuses unknown ones, for which cobra would show the help and report success.
func group(c *cobra.Command) *cobra.Command {
	c.DisableFlagsInUseLine, c.SuggestionsMinimumDistance = true, 2
	c.Args = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		if near := c.SuggestionsFor(args[0]); len(near) > 0 {
			return usageError{fmt.Errorf("there is no command %q; did you mean '%s %s'?", c.CommandPath()+" "+args[0], c.CommandPath(),
				strings.Join(near, "' or '"+c.CommandPath()+" "))}
		}
		var names []string
		for _, one := range c.Commands() {
			if one.IsAvailableCommand() {
				names = append(names, one.Name())
			}
		}
		return usageError{fmt.Errorf("there is no command %q; those of %q are %s", c.CommandPath()+" "+args[0], c.CommandPath(),
			strings.Join(names, ", "))}
	}
	c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	return c
}

// helpArgs refuses the help for an unknown command.
func helpArgs(c *cobra.Command, args []string) error {
	found, rest, err := c.Root().Find(args)
	if err == nil && len(rest) > 0 && found.HasSubCommands() && found.Args != nil {
		err = found.Args(found, rest)
	}
	return err
}

// between requires the first of these arguments, as many as needed, and allows the others.
func between(needed int, names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < needed {
			return exactly(names[:needed]...)(c, args)
		}
		return exactly(names[:min(len(args), len(names))]...)(c, args)
	}
}

// flagError adds to a flag's error which values it takes, which the parsers of the values do not say.
func flagError(c *cobra.Command, err error) error {
	var bad *pflag.InvalidValueError
	if !errors.As(err, &bad) {
		return usageError{err}
	}
	wants := map[string]string{"duration": "a time such as 90s, 5m or 2h", "int": "a number", "int64": "a number",
		"float64": "a number such as 2 or 0.5", "bool": "true or false", sizeType: sizeWanted}[bad.GetFlag().Value.Type()]
	if wants == "" {
		return usageError{err}
	}
	return usageError{fmt.Errorf("--%s is %s, not %q", bad.GetFlag().Name, wants, bad.GetValue())}
}

// oneOf completes a flag whose values are words, and refuses others before the command runs.
func oneOf(c *cobra.Command, flag string, words ...string) {
	check(c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)))
	before := c.PreRunE
	c.PreRunE = func(c *cobra.Command, args []string) error {
		given := []string{c.Flag(flag).Value.String()}
		if several, ok := c.Flag(flag).Value.(pflag.SliceValue); ok {
			given = several.GetSlice()
		}
		for _, one := range given {
			if one != "" && !slices.Contains(words, one) {
				return usageError{fmt.Errorf("--%s is %s, not %q", flag, either(words), one)}
			}
		}
		if before != nil {
			return before(c, args)
		}
		return nil
	}
}

// either joins alternatives: a, b or c.
func either(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

const (
	sizeType   = "size"
	sizeWanted = "a size in MB, or such as 512M or 4G"
)

// size is a flag's number of megabytes, as people write it.
type size struct{ mb *int64 }

// String implements pflag.Value.
func (s size) String() string {
	if s.mb == nil {
		return "0"
	}
	return strconv.FormatInt(*s.mb, 10)
}

// Type implements pflag.Value.
func (s size) Type() string { return sizeType }

// Set implements pflag.Value.
func (s size) Set(text string) error {
	number, times := strings.ToUpper(text), int64(1)
	for _, unit := range []string{"IB", "B"} {
		if short, ok := strings.CutSuffix(number, unit); ok && strings.TrimRight(short, "MGT") != short {
			number = short
			break
		}
	}
	for unit, mb := range map[string]int64{"M": 1, "G": 1 << 10, "T": 1 << 20} {
		if short, ok := strings.CutSuffix(number, unit); ok {
			number, times = short, mb
			break
		}
	}
	n, err := strconv.ParseFloat(number, 64)
	if mb := n * float64(times); err != nil || mb < 0 || mb > 1<<40 || mb != math.Trunc(mb) || strings.Trim(number, "0123456789.") != "" {
		return errors.New(sizeWanted)
	}
	*s.mb = int64(n * float64(times))
	return nil
}
