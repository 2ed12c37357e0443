package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"soulbox.dev/soulbox/api/client"
)

func (a *app) templateDeleteCommand() *cobra.Command {
	return &cobra.Command{Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Delete templates or snapshots", Args: atLeast("NAME"),
		ValidArgsFunction: a.completeTemplates, Long: "Delete templates or snapshots. Sandboxes made from them continue to run.",
		Example: "  soulbox template delete web",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.home(c.Context())
			if err != nil {
				return err
			}
			var errs error
			for _, name := range args {
				if err := at.DeleteTemplate(c.Context(), name); err != nil {
					errs = errors.Join(errs, err)
				} else {
					errs = errors.Join(errs, a.printf("%s\n", name))
				}
			}
			return errs
		}}
}

func (a *app) templateCopyCommand() *cobra.Command {
	return &cobra.Command{Use: "copy NAME NEW", Aliases: []string{"cp", "tag"}, Short: "Give a template another name",
		Args: exactly("NAME", "NEW"), ValidArgsFunction: a.completeTemplates,
		Long: "Give a template another name, perhaps with a :tag. It keeps its old name, and the two are independent: a build of one " +
			"leaves the other as it is. The copy takes no space.",
		Example: "  soulbox template copy web web:v2\n  soulbox template tag base ours",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.home(c.Context())
			if err != nil {
				return err
			}
			t, err := at.CopyTemplate(c.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return a.printf("%s\n", t.Name)
		}}
}

func (a *app) pullCommand() *cobra.Command {
	return &cobra.Command{Use: "pull REF NAME", Short: "Make a template from an image of a registry", Args: exactly("REF", "NAME"),
		Long: "Make a template from an image of a registry, with the credentials of the server's user: it works only on the machine of " +
			"the server.",
		Example: "  soulbox template pull docker.io/library/alpine:3 alpine",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.home(c.Context())
			if err != nil {
				return err
			}
			t, err := at.Pull(c.Context(), args[1], args[0])
			if err != nil {
				return err
			}
			return a.printf("%s is ready: %d MB\n", t.Name, t.SizeMB)
		}}
}

func (a *app) pushCommand() *cobra.Command {
	return &cobra.Command{Use: "push NAME REF", Short: "Push a template to a registry", Args: exactly("NAME", "REF"),
		ValidArgsFunction: a.completeTemplates,
		Long: "Push a template to a registry, with the credentials of the server's user: it works only on the machine of the " +
			"server.",
		Example: "  soulbox template push web registry.example.com/team/web:1",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.home(c.Context())
			if err != nil {
				return err
			}
			return a.push(c.Context(), at.Client, args[0], args[1])
		}}
}

func (a *app) push(ctx context.Context, at *client.Client, name, reference string) error {
	t, err := at.Push(ctx, name, reference)
	if err != nil {
		return err
	}
	return a.printf("%s is %s@%s\n", t.Name, reference, t.Digest)
}
